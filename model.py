"""
GPT-2: the network, its KV cache, generation, loading and saving.

    model, meta = load('out')                                    # a model file, a folder, or a Hub id
    for ids in model.generate(torch.tensor([[0]]), 20): ...      # one id a text a step

This file can be copied into another project alone; importing it registers a torch operator and reads
FOLIO_KERNELS. The network and its names are OpenAI's, https://github.com/openai/gpt-2, src/model.py.
Shapes in comments: B batch, T time, C channels (n_embd), nh heads, hs head size, V vocabulary, S cached
positions, O outputs of a layer.
"""
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import itertools
import math
import os
import platform
import re
import sys
import threading
import time
import warnings
import weakref
import zipfile
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

FORMAT_VERSION = 1


@dataclasses.dataclass
class GPTConfig:
    """The shape of a GPT; the defaults are GPT-2 small. Raises ValueError for an impossible shape."""
    block_size: int = 1024    # positions it has embeddings for
    vocab_size: int = 50257   # true token ids; the table may have more rows, see padded_vocab_size
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True         # in linear layers and layer norms, as in GPT-2
    quantized: str = ''       # 'int8' or 'int4' matrices, for inference only; '' = floats

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} {getattr(self, name)}: must be at least 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} is not a multiple of n_head {self.n_head}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout {self.dropout}: must be at least 0 and under 1')

    @property
    def padded_vocab_size(self):
        """Rows of the token table: a multiple of 64, which tensor cores like (50,304 for GPT-2).

        Padded rows join the softmax in training, as in nanoGPT, and are never sampled. A small table is not
        padded: 128 rows for 65 characters would add 0.7 to the first loss.
        """
        V = self.vocab_size
        return V if V < 1024 or self.quantized else math.ceil(V / 64) * 64

    def num_params(self):
        """See GPT.num_params()."""
        # each tensor's size is a multiple of n_embd; a block has two norms, and biases of 11 n_embd numbers
        rows = self.vocab_size + self.block_size + 12 * self.n_layer * self.n_embd
        return (rows + 2 * self.n_layer + 1 + (11 * self.n_layer + 1) * self.bias) * self.n_embd


# -- products ------------------------------------------------------------------------------------------------

# The fastest library on one chip is often the slowest on another. The choice depends on what the chip can do,
# not on timing, so that two runs on one machine are equal. FOLIO_KERNELS names another row of the table.
KERNELS = {  # the kernel for over 64 float32 rows, for one float32 row, for int8 weights and for int4 weights
    'avx512_vnni': ('onednn', 'parts', 'int_mm', 'int4'),  # AMD from Zen 4, Intel servers from Cascade Lake
    'avx512': ('onednn', 'parts', 'fbgemm', 'int4'),       # Skylake servers
    'avx2': ('mkl', 'onednn', 'fbgemm', 'int8'),           # Zen 1 to 3, most Intel laptops; see SMALL_MATRIX
    'other': ('torch', 'torch', 'float', 'int8')}          # ARM, and torch builds without these libraries
FBGEMM = getattr(torch.ops.quantized, 'linear_with_input_q_dq_qweight_dq_output_fp32', None)


def kernels_here():
    """The row of KERNELS for this CPU."""
    chip = torch.backends.cpu.get_cpu_capability().lower()
    if chip == 'avx512' and torch.cpu._is_vnni_supported():
        chip = 'avx512_vnni'
    x86 = torch.backends.mkldnn.is_available() and 'fbgemm' in torch.backends.quantized.supported_engines
    return chip if chip in KERNELS and x86 and FBGEMM else 'other'


CHIP = os.environ.get('FOLIO_KERNELS') or kernels_here()
if CHIP not in KERNELS:
    sys.exit(f"FOLIO_KERNELS={CHIP}: choose one of {', '.join(KERNELS)}")
MANY_ROWS, ONE_ROW, INT8, INT4 = KERNELS[CHIP]
SMALL_MATRIX = 2**19  # weights; below, MKL's float32 product is the fastest, because they stay in the cache


def product(x, weight, bias=None):
    """x (…, C) @ weight.T (C, O) + bias (O): F.linear, or a faster kernel where there is one."""
    if torch.compiler.is_compiling() and x.numel() == x.size(-1):
        # one row, as in each step of one text on a GPU: this takes an H200 2 to 4 us, and cuBLAS 4 to 7
        return (x[..., None, :] * weight).sum(-1) + (0 if bias is None else bias)
    float32 = x.dtype == torch.float32 and x.is_cpu and not torch.is_autocast_enabled('cpu')
    if not float32 or torch.jit.is_tracing() or torch.is_grad_enabled() and MANY_ROWS != 'onednn':
        return F.linear(x, weight, bias)
    # the operator would make a decoding step a tenth slower
    run = product_op if torch.is_grad_enabled() or torch.compiler.is_compiling() else cpu_product
    return run(x, weight, bias)


def cpu_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """product() by the chip's kernel, without gradients; 'parts' splits the matrix for a single row.

    MKL reads one matrix on one thread (18 GB/s on Zen 5) but a batch of parts on all threads (50 of 52 GB/s).
    Footgun: the column needs the strides of a transposed row, (1, C); with (1, 1) MKL reads at 11 GB/s.
    """
    rows, (O, C) = x.numel() // x.size(-1), weight.shape
    if MANY_ROWS != 'onednn' and (rows > 64 or O * C < SMALL_MATRIX or ONE_ROW == 'torch'):
        return F.linear(x, weight, bias)
    if rows > 1 or ONE_ROW == 'onednn':
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
    parts = math.gcd(O, 4 * torch.get_num_threads())
    column = x.reshape(1, 1, C).transpose(1, 2).expand(parts, C, 1)
    y = torch.bmm(weight.reshape(parts, O // parts, C), column).view(*x.shape[:-1], O)
    return y if bias is None else y.add_(bias)


def logits_product(x, weight):
    """x (…, C) @ weight.T (C, V) in float32: GPT-2's logits are near -100, where bfloat16 has steps of 0.5.

    Under autocast only CUDA without gradients gives float32; elsewhere it costs too much or has no gradient.
    """
    kind, autocast = x.device.type, torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    if kind == 'cuda' and dtype != torch.float32 and not torch.is_grad_enabled():  # out_dtype has no gradient
        y = torch.mm(x.flatten(0, -2).to(dtype), weight.to(dtype).t(), out_dtype=torch.float32)
        return y.unflatten(0, x.shape[:-1])
    return product(x, weight) if autocast else product(x.float(), weight.float())


# cpu_product() and its gradients as one operator: torch.compile keeps it whole instead of breaking the graph.
# custom_op() needs cpu_product()'s annotations
product_op = torch.library.custom_op('folio::product', cpu_product, mutates_args=(), device_types='cpu')


def product_gradients(ctx, grad):
    x, weight = ctx.saved_tensors
    x, rows = x.flatten(0, -2), grad.flatten(0, -2)
    grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
    return product_op(grad, weight.t(), None), product_op(rows.t(), x.t(), None), grad_bias


product_op.register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)))
product_op.register_autograd(
    product_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]))


# -- layers --------------------------------------------------------------------------------------------------

class Linear(nn.Linear):
    def forward(self, x):
        return product(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A linear layer or a token table with int8 weights (O, C) and a scale for each row: w = weight * scale.

    Each row of x is made int8 by its largest value (7 bits for FBGEMM) and multiplied in integers, so that a
    text does not depend on the others in its batch. Small matrices become floats again, which is faster. Call
    pack() once the weights are loaded, and use the layer that it returns.
    """
    def __init__(self, C, O, bias=True):
        super().__init__()
        self.register_buffer('weight', torch.zeros(O, C, dtype=torch.int8))
        self.register_buffer('scale', torch.zeros(O))
        self.register_buffer('bias', torch.zeros(O) if bias else None)
        self.packed = None

    @staticmethod
    def from_float(w):
        """weight and scale (float16) of float weights w (O, C); the largest value of a row becomes ±127."""
        scale = (w.abs().amax(dim=1) / 127).clamp(min=2**-24).half()  # 2**-24 is float16's smallest
        return (w / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8), scale

    def rows(self, idx=slice(None)):
        """Rows idx of the table as floats (…, C)."""
        return self.weight[idx] * self.scale[idx][..., None]

    def pack(self, table=False):
        """This layer, with its weights arranged for the chip's kernel, or as floats if that is faster."""
        if INT8 == 'float' or self.weight.numel() < SMALL_MATRIX:
            self.packed = self.rows()
        elif INT8 == 'fbgemm':
            zeros = torch.zeros(len(self.scale), dtype=torch.long)
            warnings.filterwarnings('ignore', 'torch.quantize_per_tensor')  # a deprecation
            q = torch._make_per_channel_quantized_tensor(self.weight, self.scale.double(), zeros, 0)
            self.packed = torch.ops.quantized.linear_prepack(q, None)
        if self.packed is not None and not table:  # the token table keeps its integers, for rows()
            self.weight = None
        return self

    def forward(self, x):
        if isinstance(self.packed, torch.Tensor):
            return product(x, self.packed, self.bias)
        largest = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).clamp_(min=1e-12)
        if self.packed is None:
            q = (x * (127 / largest)).round_().to(torch.int8).flatten(0, -2)
            y = torch._int_mm(q, self.weight.t()).float().mul_(self.scale / 127).view(*x.shape[:-1], -1)
        else:  # 7 bits: FBGEMM adds pairs of products in 16 bits, which 8 would overflow
            y = FBGEMM(x / largest, 1 / 63, 64, self.packed)
        return y.mul_(largest) if self.bias is None else torch.addcmul(self.bias, y, largest)


def halves(weight):
    """The 4-bit numbers (…, C) in bytes (…, C / 2), the low half first."""
    return torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2)


class Int4Linear(nn.Module):
    """A linear layer or a token table with 4-bit weights q and a scale for each group of a row.

    A weight is (q - 8) * scale. `weight` (O, C / 2) holds two q in a byte, the even column in the low half;
    `scale` is (O, C / GROUP). C is padded with zeros to a multiple of GROUP. Call pack() as in Int8Linear.
    """
    GROUP = 32

    def __init__(self, C, O, bias=True):
        super().__init__()
        self.shape, groups = (O, C), math.ceil(C / self.GROUP)
        self.register_buffer('weight', torch.zeros(O, groups * self.GROUP // 2, dtype=torch.uint8))
        self.register_buffer('scale', torch.zeros(O, groups))
        self.register_buffer('bias', torch.zeros(O) if bias else None)

    @staticmethod
    def from_float(w):
        """weight and scale (bfloat16) of float weights w (O, C): for each group the scale of the least error.

        A candidate makes a group's largest value a q of -7 to -10.75. q ends at -8, so beyond it that value
        is clipped and the many small ones are finer. Each candidate is then refined to the best scale for
        its q.
        """
        group = Int4Linear.GROUP
        w = F.pad(w, (0, -w.size(1) % group)).unflatten(1, (-1, group))  # (O, groups, group)
        largest = w.gather(2, w.abs().argmax(dim=2, keepdim=True))
        scale = least = torch.full_like(largest, math.inf)  # of the best candidate so far, and its error
        for i in range(16):
            start = largest / -(7 + i / 4)
            q = (w / torch.where(start == 0, 1, start)).round_().clamp_(-8, 7)
            new = ((w * q).sum(2, keepdim=True) / (q * q).sum(2, keepdim=True).clamp_(1)).bfloat16().float()
            error = (w - q * new).square_().sum(2, keepdim=True)
            # i == 0, because no error is under inf where a weight is nan, inf or above 1e19
            scale, least = torch.where((error < least) | (i == 0), new, scale), torch.minimum(error, least)
        q = (w / torch.where(scale == 0, 1, scale)).round_().clamp_(-8, 7).add_(8).flatten(1).to(torch.uint8)
        return q[:, ::2] | q[:, 1::2] << 4, scale[..., 0].bfloat16()

    def rows(self, idx=slice(None)):
        """Rows idx of the weights as floats (…, C)."""
        q = halves(self.weight[idx]).to(self.scale.dtype).unflatten(-1, (-1, self.GROUP)) - 8
        return (q * self.scale[idx][..., None]).flatten(-2)[..., :self.shape[1]]

    def pack(self, table=False):
        """This layer, with its weights arranged for torch's kernel, or an Int8Linear where that is faster.

        Int8's rounding error is small beside that of 4 bits. The kernel needs a multiple of 16 rows.
        """
        if INT4 == 'int8':
            layer = Int8Linear(*reversed(self.shape))
            parts = [layer.from_float(self.rows(idx)) for idx in torch.arange(self.shape[0]).split(1024)]
            layer.weight, layer.scale, layer.bias = *map(torch.cat, zip(*parts)), self.bias
            return layer.float().pack(table)
        pad = (0, 0, 0, -self.shape[0] % 16)
        weight, scale = F.pad(self.weight, pad), F.pad(self.scale, pad).t()  # forward() cuts the new rows off
        pack = torch._convert_weight_to_int4pack_for_cpu
        self.packed = torch.cat([pack(halves(part).int(), 1) for part in weight.split(4096)])
        self.scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), dim=-1).bfloat16()
        if not table:
            self.weight = self.scale = None
        return self

    def forward(self, x):
        rows = F.pad(x.reshape(-1, x.size(-1)), (0, -x.size(-1) % self.GROUP)).bfloat16()  # the kernel's type
        y = torch._weight_int4pack_mm_for_cpu(rows, self.packed, self.GROUP, self.scale_and_zero)
        y = y[:, :self.shape[0]].to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


LAYERS = {'': Linear, 'int8': Int8Linear, 'int4': Int4Linear}  # by GPTConfig.quantized


# -- the network ---------------------------------------------------------------------------------------------

def is_learning(module):
    """Whether a module is in train mode with gradients on; only then is there dropout."""
    return module.training and torch.is_grad_enabled()


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = LAYERS[config.quantized](config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = LAYERS[config.quantized](config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, cache=None, where=None, mask=None):
        """Attention of x (B, T, C). A cache (2, B, nh, S, hs) takes its keys and values at positions `where`.

        `where` is a slice, or a tensor (T,) of positions. Without a mask, the cache is read up to the slice's
        end; with a mask (T, S), which is added to the scores, its first S positions are read.
        """
        B, T = x.shape[:2]
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # each (B, nh, T, hs)
        dropout = self.dropout if is_learning(self) else 0.0
        if cache is not None:
            cache[..., where, :] = qkv[1:]
            k, v = cache[..., :where.stop if mask is None else mask.size(1), :]
        in_graph = q.is_cuda and mask is not None and T == 1
        if in_graph or q.dtype == torch.bfloat16 and q.is_cpu and 1 < T <= 512 and cache is None:
            y = attend_in_products(q, k, v, dropout, mask)
        else:  # is_causal aligns top-left: right for an empty cache, and one new position needs no mask
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and bool(T > 1))
        y = y.transpose(1, 2).flatten(2)  # (B, T, C), the heads side by side again
        return F.dropout(self.c_proj(y), dropout, dropout > 0)


def attend_in_products(q, k, v, dropout, mask=None):
    """Attention (B, nh, T, hs) as two plain products, causal or with a mask (T, S); holds all T x S scores.

    For bfloat16 on a CPU: at 8 x 12 x 256 x 64, forward and backward, this takes 12 ms, torch 2.13's flash
    kernel 35 ms. For one position with a mask on a GPU: this takes 11 us, torch 2.11's kernel 16 us (H100).
    """
    B, nh, T, hs = q.shape
    q, k, v = (t.reshape(B * nh, -1, hs) for t in (q, k, v))
    mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1) if mask is None else mask
    if T == 1 and torch.compiler.is_compiling():  # baddbmm would copy the mask, and could not be fused
        scores = (q * k).sum(-1)[:, None] * hs**-0.5 + mask
    else:
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=hs**-0.5)
    return torch.bmm(F.dropout(scores.softmax(dim=-1), dropout), v).view(B, nh, T, hs)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = LAYERS[config.quantized](config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = LAYERS[config.quantized](4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate='tanh')  # (B, T, 4C)
        return F.dropout(self.c_proj(x), self.dropout, is_learning(self))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, where=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, where, mask)
        return x + self.mlp(self.ln_2(x))


def loss_of_logits(logits, targets, dtype):
    """Losses (rows, 1) of logits (rows, V) for targets (rows, 1), and the gradient of their sum (rows, V).

    A probability counts as at least 2**-126, so a loss is at most 87 nats.
    """
    probs = logits.softmax(dim=-1, dtype=torch.float32)
    chosen = probs.gather(1, targets)
    return -chosen.clamp(min=2**-126).log(), probs.to(dtype).scatter_(1, targets, (chosen - 1).to(dtype))


class HeadLoss(torch.autograd.Function):
    """cross_entropy(x @ table.T, targets) for x (N, C) and table (V, C), and its gradients in the same pass.

    Only the logits of some rows are in memory at a time, as in Liger (https://arxiv.org/abs/2410.10989). For
    GPT-2 small at 32 x 128 on a CPU that saves 3 GB of memory and 6% of a float32 step's time.
    """
    of_logits = staticmethod(loss_of_logits)  # or the same compiled, see GPT.compile()

    @staticmethod
    def forward(ctx, x, table, targets):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x, weight = x.to(dtype), table.to(dtype)
        grads_x, grad_table, total = [], None, 0.0
        parts = math.ceil(len(x) * len(table) / 2**(25 if kind == 'cpu' else 29))  # of at most so many logits
        for part, ids in zip(x.chunk(parts), targets.chunk(parts)):
            losses, grad = HeadLoss.of_logits(logits_product(part, weight), ids[:, None], dtype)
            total += losses.sum()
            grads_x.append(product(grad, weight.t()))
            grad = logits_product(grad.t(), part.t())  # on a GPU float32: float16 could overflow
            grad_table = grad.float() if grad_table is None else grad_table.add_(grad)
        ctx.save_for_backward(torch.cat(grads_x), grad_table)
        return total / len(x)

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_table = ctx.saved_tensors
        scale = grad_loss / len(grad_x)
        return grad_x.mul_(scale), grad_table.mul_(scale), None


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trained_context = config.block_size  # longest window it was trained on, in tokens
        self.gradient_checkpointing = False  # saves memory: runs each block's forward again in backward
        self.compiled_steps = False  # whether a CUDA graph's step runs the compiled blocks; see graph_of()
        V, C = config.padded_vocab_size, config.n_embd
        self.wte = LAYERS[config.quantized](C, V, bias=False) if config.quantized else nn.Embedding(V, C)
        self.wpe = nn.Embedding(config.block_size, C)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C, eps=1e-5, bias=config.bias)
        # the head is wte again (weight tying, https://arxiv.org/abs/1608.05859)
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # as GPT-2: 2 layers a block add to the residual stream, so they start smaller
                residual = name.endswith('c_proj.weight')
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) of ids (B, T); with targets (B, T) their mean negative log-likelihood, in nats.

        Raises ValueError where T exceeds block_size.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.head(x)
        x, targets = x.flatten(0, 1), targets.flatten()
        if is_learning(self):
            return HeadLoss.apply(x, self.wte.weight, targets)
        rows = max(2**25 // self.config.vocab_size, 1)  # the logits of all rows at once would take gigabytes
        parts = zip(x.split(rows), targets.split(rows))
        return sum(F.cross_entropy(self.head(x), y, reduction='sum') for x, y in parts) / targets.numel()

    def hidden(self, idx, cache=None, start=0):
        """The last layer's states (B, T, C). With a cache, idx are its texts' ids from position `start` on.

        start may be a tensor: of shape () in a trace; of shape (1,) in a CUDA graph, where T is 1.
        """
        T, mask = idx.size(1), None
        if T > self.config.block_size:
            raise ValueError(f'{T} positions, and the model has {self.config.block_size}; shorten the window')
        positions = start + torch.arange(T, device=idx.device)
        x = self.wte.rows(idx) if self.config.quantized else self.wte(idx)  # (B, T, C)
        x = F.dropout(x + self.wpe(positions), self.config.dropout, is_learning(self))
        static = isinstance(start, torch.Tensor) and start.dim()
        where, end = (positions, cache[0].size(3)) if static else (slice(start, start + T), start + T)
        if isinstance(start, torch.Tensor) or start and T > 1:
            later = torch.arange(end, device=idx.device) > positions[:, None]
            mask = x.new_zeros(later.shape).masked_fill(later, -math.inf)  # (T, S)
        again = self.gradient_checkpointing and is_learning(self)
        for block, kv in zip(self.h, cache or [None] * len(self.h)):
            # a compiled block would be compiled again for each length of a text
            run = block if is_learning(self) or static and self.compiled_steps else block.forward
            x = checkpoint(run, x, use_reentrant=False) if again else run(x, kv, where, mask)
        return self.ln_f(x)

    def head(self, x):
        """Logits (…, V) of states (…, C), without the padded ids."""
        if self.config.quantized:
            return self.wte(x)
        return logits_product(x, self.wte.weight)[..., :self.config.vocab_size]

    def num_params(self):
        """Trainable numbers, the tied table once and its padding left out: 124,439,808 for GPT-2 small."""
        return self.config.num_params()

    def flops_per_token(self, seq_len):
        """Floating-point operations to train on a token: 6N + 12·layers·C·T, N without the position table.

        Each weight takes two forward and four backward; attention's two products are added. nanoGPT counts
        like this, after PaLM's appendix B, https://arxiv.org/abs/2204.02311.
        """
        N = self.num_params() - self.wpe.weight.numel()
        return 6 * N + 12 * self.config.n_layer * self.config.n_embd * seq_len

    def param_groups(self, weight_decay):
        """Three optimizer groups: the blocks' matrices, other matrices, and vectors, which do not decay."""
        others = [p for name, p in self.named_parameters() if p.dim() == 2 and not name.startswith('h.')]
        return [dict(params=[p for p in self.h.parameters() if p.dim() == 2], weight_decay=weight_decay),
                dict(params=others, weight_decay=weight_decay),
                dict(params=[p for p in self.parameters() if p.dim() < 2], weight_decay=0.0)]

    def compile(self, **options):
        """Compile blocks and loss in place. The blocks share one graph; twelve would take 4 times as long."""
        for block in self.h:
            block.compile(**options)
        HeadLoss.of_logits = staticmethod(torch.compile(loss_of_logits, **options))

    # -- generation ------------------------------------------------------------------------------------------

    def new_cache(self, texts, positions):
        """Zeros for each layer's keys and values, (2, B, nh, S, hs), and for which ids a text has, (B, V)."""
        shape = 2, texts, self.config.n_head, positions, self.config.n_embd // self.config.n_head
        seen = self.wpe.weight.new_zeros(texts, self.config.vocab_size, dtype=torch.bool)
        return [self.wpe.weight.new_zeros(shape) for _ in self.h], seen

    @torch.inference_mode()
    @sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    def next_logits(self, idx, cache, start=0):
        """Logits (B, n, V) in float32 after ids (B, T) at positions start…, which are added to the cache.

        n is T, or 1 for a prompt (at start 0), where only the last id's are wanted. cuDNN's attention stays
        out, because it plans each new length for 20 to 40 ms.
        """
        x = self.hidden(idx, cache, start)
        return self.head(x[:, -1:] if isinstance(start, int) and start == 0 else x).float()

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
                 repetition_penalty=1.0, num_samples=1, seed=1337, context=0, compile='auto', drafts=None):
        """Yield the next ids (B,), step by step, for prompts idx (P, T ≥ 1); close the generator to stop.

        Each prompt is continued num_samples times: B = P · num_samples, a prompt's texts side by side. Text i
        draws from a generator of its own, seeded with seed + i. For temperature to repetition_penalty see
        choose(), for compile fast_step() and borrowed_graph(). There is no dropout, in train mode too.

        drafts, an Index, makes a single text on a CPU faster: the model runs the ids that it proposes in one
        pass, and keeps an id if choose() takes the same one with that step's uniform number. So the text is
        the same, but for ids that are equally likely within the products' rounding (int8's is coarse).

        Footgun: the model sees a window of `context` tokens (0: the trained context). When it is full, its
        newest half is kept and run again, so no position is one that the model was not trained on, and every
        token costs about the same. A long text depends on its last context / 2 to context tokens only.
        """
        options = temperature, top_k, top_p, min_p, repetition_penalty
        steps = self.steps(idx, max_new_tokens, options, num_samples, seed, context, compile, drafts)
        # a GPU computes the next step while the last one's ids are copied and used
        yield from a_step_behind(steps) if self.wpe.weight.is_cuda else (ids.cpu() for ids in steps)

    def steps(self, idx, max_new_tokens, options, num_samples, seed, context, compile, drafts):
        """generate()'s ids (B,), on the model's device; options are choose()'s."""
        window = min(context or self.trained_context, self.config.block_size)
        idx = idx.to(self.wpe.weight.device)
        text = idx.repeat_interleave(num_samples, dim=0)  # (B, T)
        T, positions = min(idx.size(1), window), min(idx.size(1) + max_new_tokens, window)
        drafts = drafts if len(text) == 1 and idx.is_cpu else None  # a CUDA graph runs one id alone
        step, drafted = self.next_logits, []
        # passes before the trace is made, which takes as long as they do: a text known by heart may end first
        untraced = 8 if drafts and self not in TRACES else 0
        with borrowed_graph(self, len(text), positions, options, compile, max_new_tokens) as graph:
            cache, seen, replay = graph or (*self.new_cache(len(text), positions), None)
            seen.zero_().scatter_(1, text, True)
            for written, uniform in zip(range(max_new_tokens), uniform_numbers(len(text), seed, idx.device)):
                # the logits after a right draft are known; after a wrong one the last branch drafts again
                if drafted and ids.item() == drafted.pop(0):
                    logits, T = logits[:, 1:], T + 1
                elif written == 0:  # each prompt runs once; its texts get copies of its cache
                    logits = self.next_logits(idx[:, -T:], [kv[:, :len(idx)] for kv in cache])
                    logits = logits.repeat_interleave(num_samples, dim=0)
                    for kv in cache:
                        kv[:, :, :, :T] = kv[:, :len(idx), :, :T].repeat_interleave(num_samples, dim=1)
                        kv[:, :, :, T:] = 0  # masked, but 0 times an inf of a graph's last text is nan
                elif T == window:
                    T = max(window // 2, 1)
                    logits = self.next_logits(text[:, -T:], cache)
                elif graph:
                    logits, ids, T = None, replay(ids, T, uniform), T + 1
                else:
                    if untraced == 0:
                        step = fast_step(self, cache, max_new_tokens - written, compile)
                    room = min(window - T, max_new_tokens - written) - 1
                    drafted = drafts.propose(text[0], room) if drafts else []
                    new = torch.cat((ids[:, None], ids.new_tensor([drafted] * len(ids))), dim=1)
                    logits = step(new.clamp(max=self.config.vocab_size - 1), cache, T)
                    T, untraced = T + 1, untraced - 1
                if logits is not None:  # a graph chooses by itself
                    ids = choose(logits[:, 0], uniform, *options, seen)
                    seen.scatter_(1, ids[:, None], True)
                text = torch.cat((text, ids[:, None]), dim=1)
                yield ids


def uniform_numbers(texts, seed, device):
    """For each step yield numbers (texts,) in [0, 1); text i draws from a generator seeded with seed + i."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(texts)]
    while True:  # 64 steps at once, because each copy to a GPU makes the CPU wait
        yield from torch.stack([torch.rand(64, generator=one) for one in generators], dim=1).to(device)


def a_step_behind(steps):
    """Yield copies on the CPU of the ids (B,) of a GPU's steps, each while the GPU computes the next ones."""
    copies = ((ids.to('cpu', non_blocking=True), torch.cuda.current_stream(ids.device).record_event())
              for ids in steps)
    for (ids, done), _ in itertools.pairwise(itertools.chain(copies, [None])):  # a copy and the one after it
        done.synchronize()
        yield ids


@torch.inference_mode()
def choose(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
           seen=None):
    """Sample ids (B,) from logits (B, V) by inverse transform of uniform (B,), numbers in [0, 1).

    temperature 0 takes the likeliest id. `seen` (B, V) says which ids the prompt and the text have.
    repetition_penalty divides their logits, or multiplies them if negative; it is CTRL's
    (https://arxiv.org/abs/1909.05858), as in Hugging Face. For top_k, top_p and min_p see filter_logits().
    """
    if repetition_penalty != 1:
        less_likely = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(seen, less_likely, logits)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = filter_logits(logits, temperature, top_k, top_p, min_p)
    device = 'cpu' if logits.is_mps else logits.device  # MPS has no float64
    # in float64 uniform · sum stays below the sum, so the search always ends at an id with a probability;
    # only nan logits would end it beyond the last id, hence the clamp
    cumulative = logits.softmax(dim=-1).to(device).cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None].to(device) * cumulative[:, -1:]
    choice = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.size(1) - 1)
    return (choice if ids is None else ids.gather(1, choice.to(ids.device)))[:, 0].to(logits.device)


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """(logits (B, K), -inf for what may not be chosen; their ids (B, K), ascending, or None for all V).

    Logits (B, V) are divided by the temperature. Then, in Hugging Face's order, only the top_k likeliest
    stay (0: all); of these the likeliest that together reach top_p (https://arxiv.org/abs/1904.09751); of
    these the ones at least min_p times as likely as the likeliest (https://arxiv.org/abs/2407.01082).
    """
    ids = None
    if 0 < top_k < logits.size(1):
        ids = logits.topk(top_k, sorted=False).indices.sort(dim=-1).values
        logits = logits.gather(1, ids)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)  # at most 0: no overflow
    if top_p < 1:
        probs = logits.softmax(dim=-1)
        # on a CPU numpy sorts GPT-2's vocabulary in 0.1 ms, torch 2.13 in 3
        ascending = torch.from_numpy(np.sort(probs.numpy())) if probs.is_cpu else probs.sort(dim=-1).values
        least = (ascending.cumsum(dim=-1) <= 1 - top_p).sum(dim=-1, keepdim=True).clamp(max=probs.size(1) - 1)
        logits = logits.masked_fill(probs < ascending.gather(1, least), -math.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    return logits, ids


def runs_of_four(ids):
    """Each run of four ids as a uint64 (n - 3,), the last id highest, so that runs sort by their ends."""
    return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(ids, 4)).view('<u8')[:, 0]


class Index:
    """Finds where a text's last ids stand in a corpus, an array of ids (n ≥ 4,), and what follows there.

    It holds each run of four ids, of the first 10 million ids, sorted: 12 bytes an id, and a few seconds to
    make. Drafts from a corpus are REST's, https://arxiv.org/abs/2311.08252. `passes` counts the proposals.
    """
    def __init__(self, ids):
        self.ids, self.passes = np.asarray(ids[:10**7], dtype='<u2'), 0
        keys = runs_of_four(self.ids)
        order = keys.argsort(kind='stable')
        self.keys, self.ends = keys[order], (order + 4).astype(np.uint32)

    def propose(self, text, most):
        """At most `most` ids: those that follow the corpus's longest match with the end of a text (T,).

        It compares up to 32 ids at 64 places, whose runs of four sort next to the text's last four ids. A
        match of n ids gives n - 2 ids, so a text that is not in the corpus gets none, and is no slower.
        """
        self.passes += 1
        last = np.array([0] * 32 + text[-32:].tolist())[-32:].astype('<u2')  # zeros before a short text
        near = self.keys.searchsorted(runs_of_four(last[-4:])[0])
        ends = self.ends[max(near - 4, 0):near + 60].astype(np.int64)  # equal runs start at `near`
        same = self.ids[np.maximum(ends[:, None] - np.arange(1, 33), 0)] == last[::-1]
        lengths = same.cumprod(axis=1).sum(axis=1)
        best = lengths.argmax()
        # a pass over 12 ids takes 1.8 to 2.6 times as long as over one (GPT-2 small in int8 on Zen 3)
        return self.ids[ends[best]:][:max(min(lengths[best] - 2, most, 11), 0)].tolist()

    def holds(self, run):
        """Whether a run of ids (n,), 4 <= n <= 32, stands anywhere in the corpus."""
        run = np.array(run, dtype='<u2')
        first, last = (self.keys.searchsorted(runs_of_four(run), side) for side in ('left', 'right'))
        rarest = (last - first).argmin()
        starts = self.ends[first[rarest]:last[rarest]].astype(np.int64) - 4 - rarest
        starts = starts[(starts >= 0) & (starts <= len(self.ids) - len(run))]
        for i, id in enumerate(run):
            starts = starts[self.ids[starts + i] == id]
        return len(starts) > 0


CAPTURING = threading.RLock()  # captures, traces and empty models are made one at a time in a process


def or_none(make, *args):
    """make(*args), one call at a time in a process; if it fails, print why and return None."""
    try:
        with CAPTURING:
            return make(*args)
    except Exception as error:
        print(f'compile failed ({one_line(error)}); going on eagerly, which is slower', file=sys.stderr)


def one_line(error):
    """An error's message on one line, at most 300 characters; its type if it has none."""
    return ' '.join(str(error).split())[:300] or type(error).__name__


def fast_step(model, cache, steps, compile='auto'):
    """A function step(ids (B, T), cache, position) -> logits (B, T, V), for the next `steps` steps.

    It is next_logits, or its trace, which runs no Python between the operators (made in 0.3 s for GPT-2 small
    in int8). Only a CPU takes the trace, with compile 'True', or with 'auto' from 63 steps (64 ids) on. Large
    float matrices are not traced, because TorchScript cannot record oneDNN's product.
    """
    large = not model.config.quantized and 4 * model.config.n_embd**2 >= SMALL_MATRIX
    if compile == 'False' or large or cache[0].device.type != 'cpu' or compile == 'auto' and steps < 63:
        return model.next_logits
    return or_none(trace, model, cache) or model.next_logits


TRACES = weakref.WeakKeyDictionary()  # for each model, its traced steps by the number of texts


def trace(model, cache):
    """next_logits on a CPU, for as many texts as the cache has; traced once for each such number."""
    texts, traces = cache[0].size(1), TRACES.setdefault(model, {})
    if texts not in traces:
        example = torch.zeros(texts, 1, dtype=torch.long), cache, torch.tensor(cache[0].size(3) - 1)
        warnings.filterwarnings('ignore', category=torch.jit.TracerWarning)  # sizes that become constants
        traces[texts] = torch.jit.trace_module(model, {'next_logits': example}, check_trace=False).next_logits
        # TorchScript keeps a trace for ever; this frees its plans, 40% of the memory, with the model
        weakref.finalize(model, traces[texts]._debug_flush_compilation_cache)
    run = torch.inference_mode()(traces[texts])
    return lambda ids, cache, position: run(ids, cache, torch.tensor(position))


# For each device its free streams: no living graph was captured on them. A stream is used again, because it
# keeps a workspace of cuBLAS; but by one graph at a time, because in torch 2.13 a graph's end frees that
# workspace (https://github.com/pytorch/pytorch/issues/193402)
STREAMS = {}


def capture(run, *inputs):
    """run(*inputs) on a GPU as a CUDA graph, which launches all of its kernels at once.

    Call it with new inputs of the same shapes. Each call overwrites the output of the call before.
    """
    device = inputs[0].device
    free = STREAMS.setdefault(device, [])
    stream, graph = free.pop() if free else torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):  # else a failure would leave the stream set
        run(*inputs)  # loads the kernels, which a capture must not
        with torch.cuda.graph(graph, stream=stream, capture_error_mode='thread_local'):
            output = run(*inputs)

    def replay(*new):
        for buffer, values in zip(inputs, new):
            buffer[...] = values
        graph.replay()
        return output

    def end():
        graph.reset()  # first, because it frees the stream's workspace
        free.append(stream)
    weakref.finalize(replay, end).atexit = False
    return replay


@torch.inference_mode(False)  # tensors made in a caller's inference_mode could not be written outside it
def graph_of(model, texts, positions, options, compile):
    """(cache, seen, step): a step of fixed shapes as a CUDA graph, and the buffers it reads and writes."""
    if compile == 'True' and not model.compiled_steps:  # tuned, one text is 9% faster (H200)
        model.compile(dynamic=False, options={'coordinate_descent_tuning': True})
        model.compiled_steps = True
    cache, seen = model.new_cache(texts, positions)
    ids = torch.zeros(texts, dtype=torch.long, device=seen.device)

    def step(ids, position, uniform):
        """The ids (B,) that choose() takes after ids (B,) at position (1,)."""
        ids = choose(model.next_logits(ids[:, None], cache, position)[:, 0], uniform, *options, seen)
        seen.scatter_(1, ids[:, None], True)
        return ids
    return cache, seen, capture(step, ids, ids[:1].clone(), ids.float())


GRAPHS = weakref.WeakKeyDictionary()  # for each model, its idle graphs by what they were made for


@contextlib.contextmanager
def borrowed_graph(model, texts, positions, options, compile, steps):
    """What graph_of() gives, or None on a CPU, with compile 'False', and with 'auto' for under 16 `steps`.

    It is made in 20 ms; compile 'True' compiles the blocks too, which takes 20 to 50 s. Idle graphs of the
    last kind asked for are kept; each holds a cache.
    """
    idle, graph = [], None
    if model.wpe.weight.is_cuda and compile != 'False' and (compile != 'auto' or steps >= 16):
        made_for = model, texts, math.ceil(positions / 64) * 64, options, compile  # few different ones
        kind = *made_for[1:], model.wpe.weight.data_ptr()  # the weights may have moved
        with CAPTURING:
            idle = GRAPHS.get(model, {}).get(kind, [])
            GRAPHS[model] = {kind: idle}  # drops the idle graphs of another kind
            graph = idle.pop() if idle else or_none(graph_of, *made_for)
    try:
        yield graph
    finally:
        idle.extend([graph] if graph else [])


# -- losses --------------------------------------------------------------------------------------------------

@torch.no_grad()
def split_loss(model, tokens, context, max_tokens=0, name='', batch_tokens=8192):
    """Mean negative log-likelihood, in nats, of tokens 1…n-1, in non-overlapping windows of `context`.

    The short tail is included. tokens is a uint16 array; max_tokens > 0 takes only that many from its start,
    but at least two. With a name, progress goes to stderr. Raises ValueError for fewer than two tokens.
    """
    n = len(tokens[:max(max_tokens, 2)] if max_tokens else tokens) - 1  # tokens with one before them
    if n < 1:
        raise ValueError(f'{n + 1} tokens: a loss needs at least 2')
    whole, rows = n // context * context, max(batch_tokens // context, 1) * context
    total, began, shown = 0.0, time.time(), time.time()
    # between two bounds lies a batch of whole windows; the short tail comes last, alone
    for first, last in itertools.pairwise(sorted({*range(0, whole, rows), whole, n})):
        ids = torch.from_numpy(tokens[first:last + 1].astype('int64')).to(model.wpe.weight.device)
        T = min(context, last - first)
        total += model(ids[:-1].view(-1, T), ids[1:].view(-1, T)).item() * (last - first)
        if name and time.time() - shown > 2:
            shown = time.time()
            left = duration((shown - began) * (n / last - 1))
            print(f'  {name}: {last / n:.0%}, {left} left', file=sys.stderr)
    return total / n


def duration(seconds):
    """Hours, minutes and seconds, as 0:01:30."""
    return str(datetime.timedelta(seconds=round(seconds)))


# -- devices -------------------------------------------------------------------------------------------------

def keep_freed_memory():
    """Let a Linux process keep the large blocks it frees, in huge pages; call it before making any tensor.

    Otherwise they return to the kernel, and each step pays a page fault for every 4 KB of its logits. GPT-2
    small at 8 x 256 on two CPU cores: 1.3 times the tokens/s for a tenth more memory.
    """
    os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')  # torch's c10/core/impl/alloc_cpu.cpp
    if platform.libc_ver()[0] == 'glibc':
        for option, value in ((-4, 0), (-1, -1), (-2, 2**29)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            ctypes.CDLL(None).mallopt(option, value)


def pick_device(name='auto'):
    """A torch device name, CUDA's with its index; 'auto' takes CUDA, then Apple's MPS, then the CPU.

    Under torchrun, a CUDA device without an index is LOCAL_RANK's. Raises ValueError for one that is absent.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # neither opens a context on a GPU
    names = [f'cuda:{i}' for i in range(gpus)] + ['mps'] * torch.backends.mps.is_available() + ['cpu']
    name = ('cuda' if gpus else names[0]) if name == 'auto' else name
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == 'cuda' else name
    if name not in names:
        raise ValueError(f'device {name!r} is not available here; auto takes the best there is')
    return name


def pick_dtype(device, name='auto'):
    """The torch dtype to compute in; 'auto' is bfloat16, float16 or float32, the first that the chip has."""
    if name != 'auto':
        return getattr(torch, name)
    if device.startswith('cuda'):  # not is_bf16_supported(), which counts emulation too
        generation = torch.cuda.get_device_capability(device)[0]  # 7: V100 and T4; 8: A100, L4
        return torch.bfloat16 if generation >= 8 else torch.float16 if generation == 7 else torch.float32
    return torch.bfloat16 if device == 'cpu' and torch.cpu._is_avx512_bf16_supported() else torch.float32


def device_name(device):
    """A CUDA device's product name; for others the architecture, the row of KERNELS and the threads."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    return f'{device.upper()} ({platform.machine()}, {CHIP} kernels, {torch.get_num_threads()} threads)'


# -- model files ---------------------------------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path):
    """An open binary file that becomes `path` once all of it is on disk.

    After a kill or a failure at any instant the old file is there, or the new one. Raises OSError unless the
    new one is certainly on the disk.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if os.name == 'posix':  # the rename reaches the disk with the folder
            folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises a RuntimeError after an OSError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, 'strerror', None) or 'the disk may be full'
        raise OSError(f'{path} could not be written ({reason}); an older one stays') from None
    finally:
        with contextlib.suppress(OSError):  # it is not there after a rename
            os.remove(temporary)


def save(path, config, weights, tokenizer, kind='model', **facts):
    """Write a model file: plain tensors, numbers, strings, lists and dicts. Raises OSError; see replacing().

    weights is the state_dict of the plain model: a compiled one prefixes its names with _orig_mod. Padded
    rows are cut off unless kind is 'checkpoint'. tokenizer is the tokenizer's meta. facts come back in
    load()'s meta; it needs step and trained_context among them.
    """
    if kind != 'checkpoint':  # torch.save would write all rows of a mere slice, so clone()
        weights = {**weights, 'wte.weight': weights['wte.weight'][:config.vocab_size].clone()}
    with replacing(path) as f:
        torch.save({'format_version': FORMAT_VERSION, 'kind': kind, 'config': dataclasses.asdict(config),
                    'tokenizer': tokenizer, **facts, 'model': weights}, f)


def read(path, check=True):
    """A model file's contents, a dict; a nanoGPT checkpoint or a Hugging Face folder gives the same keys.

    check=False leaves the tensors on disk, which is enough to ask for the step. Raises OSError, or ValueError
    for a file that is damaged or of another format. Footgun: torch.load does not check the zip's CRCs, and
    loads a flipped bit silently.
    """
    if os.path.isdir(path):
        return from_hugging_face(path)
    try:
        with zipfile.ZipFile(path) as file:
            if check and file.testzip():
                raise zipfile.BadZipFile
        contents = dict(torch.load(path, map_location='cpu', mmap=not check, weights_only=True))
    except Exception as error:  # damaged pickles raise nearly everything there is
        if isinstance(error, (OSError, MemoryError)) or "can't allocate" in str(error):
            raise
        raise ValueError(f'{path}: damaged, or not plain tensors and values; name another') from None
    if 'model_args' in contents:
        return from_nanogpt(contents, path)
    if (version := contents.get('format_version')) != FORMAT_VERSION:
        raise ValueError(f'{path}: format version {version}, and this folio reads {FORMAT_VERSION}')
    if missing := {'kind', 'config', 'tokenizer', 'trained_context', 'step', 'model'} - set(contents):
        raise ValueError(f'{path}: lacks {min(missing)}, so it is not a whole model file; name another')
    return contents


@functools.lru_cache(maxsize=64)
def step_of(path, changed):
    """The step of a model file. `changed`, the file's time, makes the cache read it again when it changes."""
    return read(path, check=False)['step']


def find(path):
    """The model file that `path` means; a Hub id is downloaded first.

    A file means itself. A folder means its model.pt or ckpt.pt, whichever has more steps; or itself, if it is
    in Hugging Face's format; or the newest run in its subfolders. Raises FileNotFoundError if there is none.
    """
    path = download(os.fspath(path))
    names = os.listdir(path) if os.path.isdir(path) else []
    if here := [os.path.join(path, name) for name in ('model.pt', 'ckpt.pt') if name in names]:
        return max(here, key=lambda file: step_of(file, os.path.getmtime(file)))
    weights = any(re.match(r'pytorch_model|.*\.safetensors', name) for name in names)
    if os.path.isfile(path) or 'config.json' in names and weights:
        return path
    runs = [os.path.join(path, name, file) for name in names for file in ('model.pt', 'ckpt.pt')]
    if newest := max(filter(os.path.exists, runs), key=os.path.getmtime, default=None):
        return find(os.path.dirname(newest))
    raise FileNotFoundError(f'{path or "(empty)"}: no model.pt or ckpt.pt; name a file, or run '
                            'train.py config/quickstart.py')


def download(path):
    """The folder of a Hub id's model files (owner/name, or gpt2 and its sizes); any other `path` unchanged.

    Raises FileNotFoundError if the Hub does not have it, or cannot be reached.
    """
    owner = os.path.dirname(path)
    is_id = re.fullmatch(r'gpt2(-medium|-large|-xl)?|distilgpt2|[\w-][\w.-]*/[\w.-]+(?<!\.pt)', path)
    if not is_id or os.path.exists(path) or owner == 'out' or owner and os.path.isdir(owner):
        return path
    try:
        from huggingface_hub import snapshot_download  # Gradio requires it
        return snapshot_download(path, allow_patterns=['*.pt', '*.json', '*.txt', 'model*.safetensors'])
    except Exception as error:
        raise FileNotFoundError(f'{path}: not here, and not to be had from the Hub ({one_line(error)}); '
                                'connect, run hf auth login, or name a model that is here') from None


def load(path, device='cpu'):
    """(model, meta) of what find(path) finds; meta is what the file says beside the weights, and its `path`.

    The model is in eval mode, in float32, or on CUDA as pick_dtype() says. Raises FileNotFoundError, or
    ValueError for a bad file.
    """
    path = find(path)
    contents = read(path)
    try:
        return build(contents, device), {**contents, 'path': path}
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f'{path}: its parts do not fit together: {one_line(error)}') from None


def build(contents, device='cpu'):
    """The GPT, in eval mode, that a model file's contents describe. Empties contents['model'].

    Contents that do not fit together raise nearly anything.
    """
    config, weights = GPTConfig(**contents['config']), contents.pop('model')
    # normal_ would import torch's compiler, 2 s and 100 MB, only to fill tensors without memory
    with CAPTURING, torch.device('meta'), mock.patch.object(nn.init, 'normal_'):
        model = GPT(config)
    padding = config.padded_vocab_size - config.vocab_size
    if padding and len(weights['wte.weight']) == config.vocab_size:
        # the mean row: the logit of a zero row, 0, would be far above GPT-2's, which are near -100
        rows = weights['wte.weight'].mean(0, keepdim=True).expand(padding, -1)
        weights['wte.weight'] = torch.cat((weights['wte.weight'], rows))
    model.load_state_dict(weights, assign=True)
    weights.clear()  # or the file's 16-bit numbers would stay in memory
    names = [name for name, layer in model.named_modules() if hasattr(layer, 'pack')]
    if config.quantized and str(device) != 'cpu':
        print(f'{config.quantized} is for CPUs: on {device} the weights become floats again', file=sys.stderr)
        floats = {name: w for name, w in model.float().state_dict().items() if not name.endswith('scale')}
        floats.update({f'{name}.weight': model.get_submodule(name).rows() for name in names})
        return build({**contents, 'config': {**contents['config'], 'quantized': ''}, 'model': floats}, device)
    model.to(device, pick_dtype(str(device)) if str(device).startswith('cuda') else torch.float32)

    for name in names:
        model.set_submodule(name, model.get_submodule(name).pack(table=name == 'wte'))
    model.trained_context = contents['trained_context']
    return model.eval()


# -- other projects' models ----------------------------------------------------------------------------------

GPT2 = {'name': 'gpt2', 'vocab_size': 50257}  # the meta of GPT-2's tokenizer
GPT2_VOCABULARY = '3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3'  # SHA-256 of its tokens
# the settings in Hugging Face's config.json that change the network, and the values that fit folio's
NETWORK = dict(model_type=('gpt2',), activation_function=('gelu_new', 'gelu_pytorch_tanh', 'gelu_fast'),
               layer_norm_epsilon=(1e-5,), scale_attn_weights=(True,), add_cross_attention=(False,),
               scale_attn_by_inverse_layer_idx=(False,), quantization_config=(None,))


def from_hugging_face(folder):
    """read()'s contents for a folder in Hugging Face's format, by transformers.

    Raises ValueError for another network or vocabulary, and for weights that are missing or not finite.
    """
    try:
        from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel, logging
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        hf = AutoConfig.from_pretrained(folder)
        for key, values in NETWORK.items():
            if getattr(hf, key, values[0]) not in values:
                raise ValueError(f'{key} is {getattr(hf, key)!r}, where a GPT-2 has {values[0]!r}')
        facts = getattr(hf, 'folio', {'tokenizer': GPT2, 'config': {'bias': True}})  # quantize.py's facts
        words = AutoTokenizer.from_pretrained(folder).get_vocab()  # a single word where there are no files
        tokens = '\n'.join(sorted(words, key=words.get)[:50256]).encode()
        same = len(words) < 3 or hashlib.sha256(tokens).hexdigest() == GPT2_VOCABULARY
        if facts['tokenizer'] == GPT2 and not (same and 50257 <= hf.vocab_size <= 50304):
            raise ValueError(f"its {hf.vocab_size:,} tokens are not GPT-2's")
        model, info = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        for name in info['missing_keys'] | info['mismatched_keys']:  # transformers fills them at random
            raise ValueError(f'{name} is missing, or of another shape')
        if not torch.equal(model.lm_head.weight, model.transformer.wte.weight):
            raise ValueError('its head is not its token table')
        shape = hf.n_positions, facts['tokenizer']['vocab_size'], hf.n_layer, hf.n_head, hf.n_embd
        config = GPTConfig(*shape, bias=facts['config']['bias'])
    except Exception as error:  # transformers raises nearly anything for a damaged folder
        way_out = 'pip install transformers' if isinstance(error, ImportError) else 'name another'
        raise ValueError(f'{folder}: not a GPT-2 that folio can read: {one_line(error)}; {way_out}') from None
    weights = {name: w.t().contiguous() if re.search(r'c_\w+\.weight', name) else w  # Conv1D's (C, O)
               for name, w in model.transformer.state_dict().items()
               if config.bias or not name.endswith('bias')}  # Hugging Face's GPT-2 always has biases
    return imported(folder, config, weights, **facts)


def from_nanogpt(contents, path):
    """read()'s contents for a nanoGPT checkpoint. Raises ValueError if it is incomplete, or not GPT-2's."""
    try:
        size = contents['model_args']['vocab_size']
        if not 50257 <= size <= 50304:
            raise ValueError(f"{path}: has {size:,} tokens that are not GPT-2's; name another")
        config = GPTConfig(**{**contents['model_args'], 'vocab_size': 50257, 'dropout': 0.0})
        # without flash attention nanoGPT saves its masks too, as attn.bias
        weights = {re.sub(r'^(_orig_mod\.)?transformer\.', '', key): w for key, w in contents['model'].items()
                   if not key.endswith(('lm_head.weight', '.attn.bias'))}
        step, dataset = contents.get('iter_num', 0), contents.get('config', {}).get('dataset', '')
        return imported(path, config, weights, tokenizer=GPT2, step=step, dataset=dataset)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: incomplete nanoGPT checkpoint ({one_line(error)}); name another') from None


def imported(path, config, weights, /, **facts):
    """read()'s contents for a model with these weights; facts['config'] is ignored.

    Raises ValueError if a weight is not finite.
    """
    for name, w in weights.items():
        if not w.isfinite().all():
            raise ValueError(f'{path}: {name} is not finite: the training diverged; name an earlier model')
    weights['wte.weight'] = weights['wte.weight'][:config.vocab_size]
    defaults = {'step': 0, 'losses': {}, 'dataset': '', 'trained_context': config.block_size, 'made_by': path}
    return {**defaults, **facts, 'kind': 'model', 'config': dataclasses.asdict(config), 'model': weights}
