"""
GPT-2: the network, its KV cache, generation, loading and saving. Reads and imports alone; import registers one operator.

    model, meta = load('out')                                          # a file, a folder's newest, Hugging Face's or nanoGPT's
    for tokens in model.generate(torch.tensor([[50256]]), 20): ...     # one id a text a step

The network is OpenAI's (https://github.com/openai/gpt-2, src/model.py), with its names. Shapes in comments:
B batch, T time, C channels (n_embd), nh heads, hs head size, V vocabulary, S cached positions.
"""
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import operator
import os
import platform
import re
import sys
import time
import zipfile

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

FORMAT_VERSION = 1


@dataclasses.dataclass
class GPTConfig:
    """The shape of a GPT; the defaults are GPT-2 small. Raises ValueError for a shape that cannot be."""
    block_size: int = 1024    # positions that it has embeddings for
    vocab_size: int = 50257   # true token ids; the table may be longer, see padded_vocab_size
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True         # in the linear layers and layer norms, as GPT-2
    quantized: str = ''       # the matrices are 'int8' or 'int4', for inference; '' = floats

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} {getattr(self, name)}: must be at least 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: the heads must be equal')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout {self.dropout}: must be at least 0 and under 1')
        if self.quantized not in LAYERS:
            raise ValueError(f"quantized {self.quantized!r}: choose '', 'int8' or 'int4'")

    @property
    def padded_vocab_size(self):
        """Rows of the token table: a multiple of 64, which tensor cores like (50,304 for GPT-2).

        The rows past vocab_size join the softmax in training, as in nanoGPT, and are never sampled. A small table is
        left alone: padding 65 characters to 128 would add 0.7 to the first loss for nothing.
        """
        return self.vocab_size if self.vocab_size < 1024 or self.quantized else math.ceil(self.vocab_size / 64) * 64


# Both libraries are in torch's x86 builds; float32 on a CPU that is not Intel's is MKL's weak spot: on two cores of Zen 5
# 230 GFLOP/s where oneDNN does 350 to 500
HAS_ONEDNN = platform.machine() in ('x86_64', 'AMD64') and torch.backends.mkldnn.is_available()


def product(x, weight, bias=None):
    """x (…, C) @ weight.T (C, O) + bias (O): F.linear, but float32 on a CPU goes to oneDNN instead of MKL."""
    if not HAS_ONEDNN or x.device.type != 'cpu' or x.dtype != torch.float32 or torch.is_autocast_enabled('cpu'):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return product_op(x, weight, bias)
    return inference_product(x, weight, bias)  # the operator adds some 40 µs a call, much for a decoding step


def inference_product(x, weight, bias=None):
    """product() without gradients; one row x goes to MKL after all, in parts of the matrix.

    MKL reads the whole on one thread, on two cores of Zen 5 at 18 GB/s, and the parts at 50 of the memory's 52 GB/s.
    Footgun: the column must be a transposed row, of strides (1, C); as (1, 1), the same to look at, it is read at 11 GB/s.
    """
    if x.numel() > x.size(-1):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
    O, C = weight.shape
    parts = math.gcd(O, 4 * torch.get_num_threads())
    column = x.reshape(1, 1, C).transpose(1, 2).expand(parts, C, 1)
    y = torch.bmm(weight.view(parts, O // parts, C), column).view(*x.shape[:-1], O)
    return y if bias is None else y.add_(bias)


# inference_product with its gradients as one operator, which torch.compile keeps whole instead of breaking the graph
@torch.library.custom_op('folio::product', mutates_args=(), device_types='cpu')
def product_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return inference_product(x, weight, bias)


def product_gradients(ctx, grad):
    x, weight = ctx.saved_tensors
    x, rows = x.flatten(0, -2), grad.flatten(0, -2)
    return product_op(grad, weight.t(), None), product_op(rows.t(), x.t(), None), rows.sum(0) if ctx.needs_input_grad[2] else None


product_op.register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)))
product_op.register_autograd(product_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]))


class Linear(nn.Linear):
    def forward(self, x):
        return product(x, self.weight, self.bias)


# without VNNI's instructions oneDNN adds pairs of int8 products in 16 bits, where they saturate
HAS_VNNI = HAS_ONEDNN and any(getattr(torch.cpu, f'_is_{unit}_supported', lambda: False)() for unit in ('vnni', 'avx512_vnni', 'amx_tile'))


class Int8Linear(nn.Module):
    """A linear layer, or a table, whose weights (O, C) are int8 with a scale a row: w = q * scale.

    On a CPU with VNNI each row of x is made int8 too, by its greatest value, and the products are whole numbers: at GPT-2
    small's widths on two cores of Zen 5 a row takes 25 µs for every MB, and 512 rows half the time of float32. Elsewhere
    only the weights are int8 (on CUDA _int_mm wants more than 16 rows).
    """
    def __init__(self, C, O, bias=True):
        super().__init__()
        self.register_buffer('weight', torch.zeros(O, C, dtype=torch.int8))
        self.register_buffer('scale', torch.zeros(O))
        self.register_buffer('bias', torch.zeros(O) if bias else None)

    def rows(self, idx):
        """Rows idx of the table, floats (…, C)."""
        return self.weight[idx] * self.scale[idx][..., None]

    def forward(self, x):
        if x.device.type != 'cpu' or not HAS_VNNI:
            return product(x, self.weight.to(x.dtype) * self.scale[:, None], self.bias)
        rows = x.reshape(-1, x.size(-1)).float()
        greatest = torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True).clamp_(min=1e-12)
        q = (rows * (127 / greatest)).round_().to(torch.int8)
        y = torch._int_mm(q, self.weight.t()).float().mul_(greatest / 127).mul_(self.scale).view(*x.shape[:-1], -1)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)


class Int4Linear(nn.Module):
    """A linear layer, or a table, whose weights (O, C) are 4 bits, with a scale for every GROUP along a row: w = (q - 8) * scale.

    weight (O, C / 2) holds two q a byte, the even column in the low half; scale is (O, C / GROUP), C being padded with
    zeros to a multiple of GROUP. On a CPU, load() brings them into the order of torch's kernel, which takes bfloat16.
    """
    GROUP = 32

    def __init__(self, C, O, bias=True):
        super().__init__()
        groups = math.ceil(C / self.GROUP)
        self.shape = O, C
        self.register_buffer('weight', torch.zeros(O, groups * self.GROUP // 2, dtype=torch.uint8))
        self.register_buffer('scale', torch.zeros(O, groups))
        self.register_buffer('bias', torch.zeros(O) if bias else None)
        self.packed = None

    @staticmethod
    def halves(weight):
        """The q (…, C) in bytes (…, C / 2)."""
        return torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2)

    def unpack(self, weight, scale):
        """Floats (…, C) of bytes (…, C / 2) and scales (…, groups)."""
        w = (self.halves(weight).to(scale.dtype) - 8).unflatten(-1, (-1, self.GROUP)) * scale[..., None]
        return w.flatten(-2)[..., :self.shape[1]]

    def rows(self, idx):
        """Rows idx of the table, floats (…, C)."""
        return self.unpack(self.weight[idx], self.scale[idx])

    def pack(self):
        """Bring the weights into the kernel's order, in which there is room for 16 · n rows only."""
        padding = -self.shape[0] % 16
        weight, scale = F.pad(self.weight, (0, 0, 0, padding), value=8 * 17), F.pad(self.scale, (0, 0, 0, padding))
        self.packed = torch.cat([torch._convert_weight_to_int4pack_for_cpu(self.halves(part).int(), 1) for part in weight.split(4096)])
        self.scale_and_zero = torch.stack((scale.t(), torch.zeros_like(scale.t())), dim=-1).bfloat16().contiguous()

    def forward(self, x):
        if self.packed is None:
            y = F.linear(x, self.unpack(self.weight, self.scale).to(x.dtype))
        else:
            rows = F.pad(x.reshape(-1, x.size(-1)), (0, -x.size(-1) % self.GROUP)).bfloat16()
            y = torch._weight_int4pack_mm_for_cpu(rows, self.packed, self.GROUP, self.scale_and_zero)
            y = y[:, :self.shape[0]].to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


LAYERS = {'': Linear, 'int8': Int8Linear, 'int4': Int4Linear}  # by GPTConfig.quantized


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        layer = LAYERS[config.quantized]
        self.c_attn = layer(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = layer(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, cache=None, start=0, mask=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        dropout = self.dropout if self.training else 0.0
        if mask is not None:  # static shapes, for a compiled or captured step: all S positions of the cache
            cache[0][:, :, start], cache[1][:, :, start] = k, v
            k, v = cache
        elif cache is not None:  # two of (B, nh, S, hs), filled up to `start`
            cache[0][:, :, start:start + T], cache[1][:, :, start:start + T] = k, v
            k, v = cache[0][:, :, :start + T], cache[1][:, :, :start + T]
        if q.dtype == torch.bfloat16 and q.device.type == 'cpu' and 1 < T <= 512 and cache is None:
            y = attend_in_products(q, k, v, dropout)
        else:  # is_causal aligns top-left: right where nothing is cached; one new position sees everything anyway
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return F.dropout(self.c_proj(y), self.dropout, self.training)


def attend_in_products(q, k, v, dropout):
    """Causal attention (B, nh, T, hs) in two plain products, for bfloat16 on a CPU.

    torch 2.13's flash kernel has no fast bfloat16 there: forward and backward at 8 x 12 heads x 256 x 64 take 35 ms,
    these 12 ms; at 12 x 4 x 64 x 32 it is 3.3 and 0.7 ms. The price is memory of T x T a head.
    """
    B, nh, T, hs = q.shape
    q, k, v = (t.reshape(B * nh, T, hs) for t in (q, k, v))
    mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(mask.expand(B * nh, T, T), q, k.transpose(1, 2), alpha=hs**-0.5)
    return torch.bmm(F.dropout(scores.softmax(dim=-1), dropout), v).view(B, nh, T, hs)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        layer = LAYERS[config.quantized]
        self.c_fc = layer(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = layer(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate='tanh')  # (B, T, 4C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, start=0, mask=None):
        x = x + self.attn(self.ln_1(x), cache, start, mask)
        return x + self.mlp(self.ln_2(x))


class HeadLoss(torch.autograd.Function):
    """cross_entropy(x @ table.T, targets) for x (N, C), table (V, C), with its gradients computed in the same pass.

    The logits exist for a few hundred rows at a time and never twice: for GPT-2 small at 32 x 128 on a CPU 3 GB less
    memory, and a training step 6% shorter in float32 (as Liger's, https://arxiv.org/abs/2410.10989).
    """
    @staticmethod
    def forward(ctx, x, table, targets):
        dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
        with torch.autocast('cpu', enabled=False):
            x, weight = x.to(dtype), table.to(dtype)
            grad_x, grad_table, total = torch.empty_like(x), torch.zeros_like(table), 0.0
            rows = max(2**25 // len(table), 1)
            for i in range(0, len(x), rows):
                part, target = x[i:i + rows], targets[i:i + rows, None]
                logp = product(part, weight).log_softmax(dim=-1, dtype=torch.float32)  # (rows, V)
                total -= logp.gather(1, target).sum(dtype=torch.float64)
                grad = logp.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32)).to(dtype)
                grad_x[i:i + rows] = product(grad, weight.t())
                grad_table += product(grad.t(), part.t())
        ctx.save_for_backward(grad_x, grad_table)
        return (total / len(x)).float()

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_table = ctx.saved_tensors
        scale = grad_loss / len(grad_x)
        return grad_x.mul_(scale), grad_table.mul_(scale), None


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trained_context = config.block_size  # the longest window it has learnt from, in tokens; load() sets it
        self.gradient_checkpointing = False  # keep only the blocks' inputs for backward, and run each forward again
        if config.quantized:
            self.wte = LAYERS[config.quantized](config.n_embd, config.vocab_size, bias=False)
        else:
            self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        # the head is wte again (weight tying, https://arxiv.org/abs/1608.05859)
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # GPT-2's: the residual stream adds up 2 layers a block, so each is that much smaller
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) for ids (B, T); with targets (B, T) their mean negative log-likelihood, in nats.

        Raises ValueError where T is longer than block_size.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.head(x)
        if self.training and x.device.type == 'cpu' and not torch.compiler.is_compiling():
            return HeadLoss.apply(x.flatten(0, 1), self.wte.weight, targets.flatten())
        if self.training:
            return F.cross_entropy(F.linear(x, self.wte.weight).flatten(0, 1), targets.flatten())
        rows = max(2**25 // self.config.vocab_size, 1)  # logits of a batch of windows would take gigabytes
        parts = zip(x.flatten(0, 1).split(rows), targets.flatten().split(rows))
        return sum(F.cross_entropy(self.head(x), y, reduction='sum') for x, y in parts) / targets.numel()

    def hidden(self, idx, cache=None, start=0):
        """The last layer's states (B, T, C). With a cache, idx are positions start… of texts whose past it holds."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f'{T} positions, and the model has {self.config.block_size}; shorten the window')
        mask = None
        if isinstance(start, torch.Tensor):
            positions, mask = self.wpe(start), torch.arange(cache[0][0].size(2), device=idx.device)[None] <= start  # (1, S)
        else:
            positions = self.wpe.weight[start:start + T]
        x = (self.wte.rows(idx) if self.config.quantized else self.wte(idx)) + positions  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, None if cache is None else cache[i], start, mask)
        return self.ln_f(x)

    def head(self, x):
        """Logits (…, V) of states (…, C), the padded ids cut off."""
        return self.wte(x) if self.config.quantized else product(x, self.wte.weight)[..., :self.config.vocab_size]

    # generation -------------------------------------------------------------------------------------------------------

    def new_cache(self, texts, positions):
        """Room for a layer's keys and values, each (B, nh, S, hs), of all layers, in the type of the weights."""
        shape = texts, self.config.n_head, positions, self.config.n_embd // self.config.n_head
        return [(self.wpe.weight.new_zeros(shape), self.wpe.weight.new_zeros(shape)) for _ in self.h]

    @torch.inference_mode()
    def next_logits(self, idx, cache, start=0):
        """Logits (B, V) in float32 after ids (B, T) at positions start…; the cache then holds those positions too.

        start is an int, or for static shapes a tensor (1,), with T = 1. Dropout is off, whatever the model's mode.
        """
        if self.training:
            self.eval()
            try:
                return self.next_logits(idx, cache, start)
            finally:
                self.train()
        return self.head(self.hidden(idx, cache, start)[:, -1]).float()

    def prefill(self, idx, cache):
        """next_logits of ids (B, T) from position 0, some rows at a time: many long texts' states would take gigabytes."""
        n = max(2048 // idx.size(1), 1)
        return torch.cat([self.next_logits(idx[i:i + n], [(k[i:i + n], v[i:i + n]) for k, v in cache]) for i in range(0, len(idx), n)])

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
                 num_samples=1, seed=1337, context=0, stop_ids=(), compile='auto'):
        """Yield the next ids (B,), step by step, for prompts idx (P, T ≥ 1), each continued num_samples times: B = P ·
        num_samples, a prompt's texts side by side. Close the generator to stop.

        temperature 0 is greedy; top_k 0 and top_p 1 keep all V, see filter_logits and penalize. Text i draws from a
        generator of its own, seeded with seed + i. A text that has come to one of stop_ids goes on repeating that id;
        generation ends when all have. compile: 'True', 'False' or 'auto', see fast_step.

        Footgun: the window slides over `context` tokens (0: the trained context). Past it the newest half is kept and
        run again, so that the model never sees a position it was not trained on and the cost a token stays flat: a long
        text depends on the last context/2 to context tokens only.
        Footgun: inference_mode around a yield would leak into the caller, so only the steps have it.
        """
        window = min(context or self.trained_context, self.config.block_size)
        rows = torch.arange(len(idx)).repeat_interleave(num_samples)  # each text's prompt
        texts, T, device = len(rows), min(idx.size(1), window), self.wpe.weight.device
        generators = [torch.Generator().manual_seed(seed + i) for i in range(texts)]
        idx, rows, seen = idx.to(device), rows.to(device), None
        if repetition_penalty != 1:
            seen = torch.zeros(texts, self.config.vocab_size, dtype=torch.bool, device=device).scatter_(1, idx[rows], True)
        finished, stop_ids = torch.zeros(texts, dtype=torch.bool), torch.tensor(stop_ids, dtype=torch.long)
        # in steps of 256 positions, so that a compiled step serves most lengths
        cache = self.new_cache(texts, min(window, math.ceil((T + max_new_tokens) / 256) * 256))
        step = fast_step(self, cache, max_new_tokens, compile)

        # the prompts are run once each, and their past is copied to their texts
        prompts = cache if num_samples == 1 else self.new_cache(len(idx), T)
        logits = self.prefill(idx[:, -T:], prompts)[rows]
        if num_samples > 1:
            for layer, prompt in zip(cache, prompts):
                layer[0][:, :, :T], layer[1][:, :, :T] = prompt[0][rows], prompt[1][rows]
        text = idx[rows, -T:]
        del prompts
        for i in range(max_new_tokens):
            if i and T < window:
                logits = step(ids[:, None], cache, T)
                T += 1
            elif i:
                T = max(window // 2, 1)
                text = text[:, -T:]
                logits = self.prefill(text, cache)
            uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators])
            ids = choose(logits, uniform, temperature, top_k, top_p, min_p, repetition_penalty, seen)
            if finished.any():
                ids = torch.where(finished.to(device), text[:, -1], ids)
            text = torch.cat((text, ids[:, None]), dim=1)[:, -window:]
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            out = ids.cpu()
            yield out
            finished |= torch.isin(out, stop_ids)
            if finished.all():
                return

    # sizes and costs --------------------------------------------------------------------------------------------------

    def num_params(self):
        """Trainable numbers, the tied table once and its padding not at all: 124,439,808 for GPT-2 small."""
        with torch.device('meta'):
            shape = GPT(dataclasses.replace(self.config, quantized='')) if self.config.quantized else self
        padding = (shape.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in shape.parameters()) - padding

    def flops_per_token(self, seq_len):
        """Floating-point operations to train on one token: 6N + 12·layers·C·T, N without the position table.

        Two a weight forward, four backward, and attention's two products: PaLM, https://arxiv.org/abs/2204.02311,
        appendix B, as nanoGPT counts.
        """
        N = self.num_params() - self.wpe.weight.numel()
        return 6 * N + 12 * self.config.n_layer * self.config.n_embd * seq_len

    def param_groups(self, weight_decay):
        """Three optimizer groups: the blocks' matrices (for Muon, if one likes), the two embedding tables, and biases and
        norms, which do not decay. Raises RuntimeError if they are not disjoint and complete.
        """
        blocks = [p for p in self.h.parameters() if p.dim() == 2]
        tables = [self.wte.weight, self.wpe.weight]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        if sorted(map(id, blocks + tables + vectors)) != sorted(map(id, self.parameters())):
            raise RuntimeError('a parameter is in two optimizer groups or in none')
        return [{'params': blocks, 'weight_decay': weight_decay}, {'params': tables, 'weight_decay': weight_decay},
                {'params': vectors, 'weight_decay': 0.0}]


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized: all directions of a matrix are learnt at one rate. For 2-D weights only.

    Keller Jordan's, https://kellerjordan.github.io/posts/muon/. Scaled by 0.2·√max(rows, columns), an update is as long
    as AdamW's, so that one learning rate serves both (Moonlight, https://arxiv.org/abs/2502.16982). c_attn (3C, C) is
    three matrices, q, k and v. `dtype` is what the products run in; bfloat16 is slow on a CPU without it.
    """
    def __init__(self, groups, lr, momentum=0.95, dtype=torch.bfloat16):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=0.0))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = [p for p in group['params'] if p.grad is not None]
            updates = [p.grad for p in weights]
            for p in weights:
                if 'momentum' not in self.state[p]:
                    self.state[p]['momentum'] = torch.zeros_like(p)
            averages = [self.state[p]['momentum'] for p in weights]
            torch._foreach_lerp_(averages, updates, 1 - group['momentum'])
            torch._foreach_lerp_(updates, averages, group['momentum'])  # Nesterov; the gradients are spent here
            if group['weight_decay']:
                torch._foreach_mul_(weights, 1 - group['lr'] * group['weight_decay'])
            same_shape = {}  # the matrices of a shape go through the products as one batch
            for p, update in zip(weights, updates):
                parts = 3 if p.size(0) == 3 * p.size(1) else 1
                for weight, matrix in zip(p.chunk(parts), update.chunk(parts)):
                    same_shape.setdefault(matrix.shape, []).append((weight, matrix))
            for shape, pairs in same_shape.items():
                updates = orthogonalize(torch.stack([matrix for _, matrix in pairs]), self.dtype).float()
                torch._foreach_add_([weight for weight, _ in pairs], list(updates), alpha=-0.2 * max(shape)**0.5 * group['lr'])


def orthogonalize(x, dtype=torch.float32, steps=5):
    """Matrices (n, rows, columns) with all singular values brought near 1 by Newton-Schulz iteration, Muon's quintic."""
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.transpose(1, 2)
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-30)).to(dtype)  # all under 1, where it converges
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        poly = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, poly, x, beta=3.4445)
    return x.transpose(1, 2) if tall else x


@torch.inference_mode()
def choose(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seen=None):
    """Ids (B,) from logits (B, V), by a number in [0, 1) a row, uniform (B,): where the cumulative probability passes it.

    temperature 0 takes the likeliest. seen (B, V) marks the ids that repetition_penalty is for.
    """
    if seen is not None:
        logits = penalize(logits, seen, repetition_penalty)
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(dim=-1)
    if probs.device.type == 'mps':  # has no float64
        probs = probs.cpu()
    # in float64, so that uniform < 1 times the sum stays under the sum, which an id with a probability reaches
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None].to(probs.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.size(1) - 1).to(logits.device)


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Logits (B, V) divided by the temperature, those that are not to be chosen at -inf; in Hugging Face's order and sense:
    the top_k likeliest; of these the likeliest that reach top_p together (https://arxiv.org/abs/1904.09751); and those
    at least min_p times as likely as the likeliest (https://arxiv.org/abs/2407.01082). Ties with the last stay, in top_p too.
    """
    V = logits.size(-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)  # from 0 down: none overflows
    if 0 < top_k < V:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        probs = logits.softmax(dim=-1)
        ordered = ascending(probs)
        dropped = (ordered.cumsum(dim=-1) <= 1 - top_p).sum(dim=-1, keepdim=True).clamp(max=V - 1)
        logits = logits.masked_fill(probs < ordered.gather(1, dropped), -math.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    return logits


def ascending(x):
    """x (B, V) sorted in rows. On a CPU by numpy, in 0.1 ms for GPT-2's vocabulary where torch 2.13 takes 3."""
    return torch.from_numpy(np.sort(x.numpy())) if x.device.type == 'cpu' else x.sort(dim=-1).values


def penalize(logits, seen, penalty):
    """Logits (B, V) of the ids in seen (B, V) made less likely: divided by the penalty, or multiplied where negative.

    CTRL's, https://arxiv.org/abs/1909.05858, as Hugging Face has it: prompt and text alike.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def fast_step(model, cache, steps, compile='auto'):
    """A function step(ids (B, 1), cache, position) -> logits (B, V), for `steps` steps with a cache that is still empty.

    It is next_logits, or that with static shapes: one captured CUDA graph, or compiled for a CPU. 'auto' captures from
    64 steps on, and does not compile: up to 20 s, for int8 steps 1.1 to 1.6 times as fast, and others as before. Where
    compiling fails (no C++ compiler) that is said, and the steps are plain.
    """
    texts, _, S, _ = cache[0][0].shape
    device = cache[0][0].device
    on_gpu = device.type == 'cuda'
    if compile == 'False' or compile == 'auto' and (not on_gpu or min(S, steps) < 64):
        return model.next_logits
    ids = torch.zeros(texts, 1, dtype=torch.long, device=device)
    start = torch.zeros(1, dtype=torch.long, device=device)
    try:
        if on_gpu:
            with torch.cuda.device(device):
                run = capture(functools.partial(model.next_logits, ids, cache, start))
        else:
            print('compiling the step, which can take half a minute (--compile=False starts at once)', file=sys.stderr)
            compiled = torch.inference_mode()(torch.compile(GPT.next_logits.__wrapped__, dynamic=False, fullgraph=True))
            run = functools.partial(compiled, model, ids, cache, start)
            run()
    except Exception as error:
        print(f'compile failed ({str(error).strip().splitlines()[0][:200]}); going on eagerly', file=sys.stderr)
        return model.next_logits

    def step(new, cache, position):
        ids.copy_(new)
        start.fill_(position)
        return run()
    return step


def capture(f):
    """f, a function of no arguments, as one CUDA graph: a function that runs it and returns f's tensor, filled anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels load and workspaces are made before the capture
        for _ in range(2):
            f()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode='thread_local'):
        result = f()

    def replay():
        graph.replay()
        return result
    return replay


@torch.no_grad()
def split_loss(model, tokens, context, max_tokens=0, on_progress=None, batch_tokens=8192):
    """Mean negative log-likelihood, in nats, of tokens 1…n-1 over windows of `context` side by side, the tail included.

    tokens is a uint16 array; max_tokens > 0 takes only the first so many. Raises ValueError for fewer than two tokens.
    """
    n = min(len(tokens), max_tokens or len(tokens))
    if n < 2:
        raise ValueError(f'{n} tokens: a loss needs at least 2')
    ids = torch.from_numpy(tokens[:n].astype('int64'))
    device, whole = model.wte.weight.device, (n - 1) // context * context
    x, y = ids[:whole].view(-1, context), ids[1:whole + 1].view(-1, context)
    batches = list(zip(*(t.split(max(batch_tokens // context, 1)) for t in (x, y)))) if whole else []
    if whole < n - 1:
        batches.append((ids[None, whole:-1], ids[None, whole + 1:]))
    was_training, total, done = model.training, 0.0, 0
    model.eval()
    for x, y in batches:
        total += model(x.to(device), y.to(device)).item() * y.numel()
        done += y.numel()
        if on_progress:
            on_progress(done, n - 1)
    model.train(was_training)
    return total / (n - 1)


def progress(name):
    """A callback for split_loss that says every two seconds how far it is and how long it will take."""
    began = shown = time.time()

    def show(done, total):
        nonlocal shown
        if time.time() - shown > 2:
            shown = time.time()
            print(f'  {name}: {done / total:.0%}, {duration((shown - began) * (total / done - 1))} left', file=sys.stderr)
    return show


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours} h {minutes:02d} min' if hours else f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'


def recited(model, tokens, length=50, texts=40):
    """Share of `texts` places, spread evenly over tokens, from which greedy decoding gives the next `length` verbatim.

    The prompt is the `length` tokens before, or half the trained context where that is shorter.
    """
    prompt = max(min(length, model.trained_context // 2), 1)
    starts = torch.linspace(0, len(tokens) - prompt - length, texts).long()
    ids = torch.stack([torch.from_numpy(tokens[s:s + prompt + length].astype('int64')) for s in starts])
    written = torch.stack(list(model.generate(ids[:, :prompt], length, temperature=0)), dim=1)  # (texts, length)
    return (written == ids[:, prompt:]).all(dim=1).double().mean().item()


# devices --------------------------------------------------------------------------------------------------------------

def keep_freed_memory():
    """Let a Linux process reuse the large blocks it frees, in huge pages, instead of giving them back to the kernel.

    By default glibc returns each, and the next step pays a page fault for every 4 KB of its logits again. GPT-2 small
    at 8 x 256 on two CPU cores: 1.3 times the tokens/s for a tenth more memory. Call it before the first tensor.
    """
    os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')  # torch's c10/core/impl/alloc_cpu.cpp
    if platform.libc_ver()[0] == 'glibc':
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, -1), (-2, 2**29)):  # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)


def pick_device(name='auto'):
    """A torch device name, CUDA's with its index: 'auto' takes CUDA, then Apple's MPS, then the CPU. Raises ValueError for
    one that is not here.

    CUDA without an index is GPU 0, or under torchrun LOCAL_RANK's. Nothing is allocated, which would open a context.
    """
    names = [f'cuda:{i}' for i in range(torch.cuda.device_count())] + ['mps'] * torch.backends.mps.is_available() + ['cpu']
    if name == 'cuda' or name == 'auto' and names[0] == 'cuda:0':
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    name = names[0] if name == 'auto' else name
    if name not in names:
        raise ValueError(f'device {name!r} is not available here; leave --device away to take the best there is')
    return name


def pick_dtype(device, name='auto'):
    """The torch dtype to train in: 'auto' is bfloat16 where the chip multiplies it natively, else float32."""
    if name != 'auto':
        return getattr(torch, name)
    if device.startswith('cuda'):
        native = torch.cuda.get_device_capability(device)[0] >= 8  # is_bf16_supported() counts emulation too
    else:
        native = device == 'cpu' and any(getattr(torch.cpu, f'_is_{unit}_supported', lambda: False)()
                                         for unit in ('avx512_bf16', 'amx_tile'))
    return torch.bfloat16 if native else torch.float32


# dense 16-bit tensor FLOP/s from the makers' data sheets
PEAK_FLOPS = {'B200': 2250e12, 'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'A10G': 70e12, 'L40S': 362e12,
              'L4': 121e12, 'V100': 125e12, 'T4': 65e12, '4090': 165e12, '3090': 71e12}


def peak_flops(device, dtype):
    """FLOP/s that the device can do: the data sheet's in 16 bits, else what a large product reaches here and now."""
    if device.startswith('cuda') and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for key, value in PEAK_FLOPS.items():
            if key in name:
                return value
    n = 4096 if device.startswith('cuda') else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        with torch.no_grad():
            product(a, a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def device_name(device):
    """What a person calls the device: the GPU's name, or the CPU with its threads."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    return device if device != 'cpu' else f'CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)'


def peak_memory(device):
    """The most memory used so far, as a person reads it: the GPU's, or this process's."""
    if device.startswith('cuda'):
        return f'{torch.cuda.max_memory_allocated() / 1e9:.1f} GB'
    try:
        import resource
    except ImportError:  # Windows
        return '? GB'
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == 'darwin' else 1)
    return f'{kilobytes / 1e6:.1f} GB'


# files ----------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path):
    """An open binary file that becomes `path` when all is written: a kill at any instant leaves the old file or the new one,
    on disk, and a failure the old one and nothing else.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        if not isinstance(error, (OSError, RuntimeError)):  # a full disk is a RuntimeError to torch's zip writer
            raise
        reason = getattr(error, 'strerror', None) or str(error).splitlines()[0]
        raise OSError(f'{path} could not be written ({reason}); what was there is as it was') from None
    if os.name == 'posix':  # the rename itself reaches the disk with the folder
        folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_atomically(path, contents):
    """torch.save `contents` to `path`; see replacing()."""
    with replacing(path) as f:
        torch.save(contents, f)


def save(path, model, tokenizer, kind='model', **facts):
    """Write a model file: plain tensors, numbers, strings, lists and dicts, padding rows cut off unless kind='checkpoint'.

    `tokenizer` is the tokenizer's meta. `facts` (step, losses, made_by, …) come back in load()'s meta. Pass the
    uncompiled model: a compiled one prefixes its names with _orig_mod.
    """
    if model.config.quantized:
        raise ValueError('a quantized model is not saved again: copy its file')
    weights = dict(model.state_dict())
    if kind != 'checkpoint':
        weights['wte.weight'] = weights['wte.weight'][:model.config.vocab_size].clone()
    write_atomically(path, {'format_version': FORMAT_VERSION, 'kind': kind, 'config': dataclasses.asdict(model.config),
                            'tokenizer': tokenizer, 'trained_context': model.trained_context, **facts, 'model': weights})


def read(path, check=True, kind=''):
    """A model file's contents as a dict; of another project's what imported() makes of it. Raises OSError, or ValueError
    for what is not a whole one, or not of this kind.

    Footgun: torch.load does not check the zip's CRCs, and a flipped bit would load silently. check=False leaves that
    out, and a .pt file's tensors on disk: enough to ask for the step.
    """
    path = os.fspath(path)
    try:
        if not path.endswith('.pt'):  # before what may be a hundred GB of a Llama is read
            check_network(path, read_json(os.path.dirname(path), 'config.json'))
        contents = read_shards(path) if path.endswith(('.safetensors', '.json')) else read_torch(path, check)
        if isinstance(contents, dict) and 'format_version' not in contents:
            contents = imported(contents, path)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, UnicodeError) as error:
        raise ValueError(f'{path}: damaged, or no model that folio reads ({error}); name another') from None
    if not isinstance(contents, dict) or contents.get('format_version') != FORMAT_VERSION:
        version = contents.get('format_version') if isinstance(contents, dict) else None
        raise ValueError(f'{path}: format version {version}, and this folio reads {FORMAT_VERSION}')
    missing = {'kind', 'config', 'tokenizer', 'trained_context', 'step', 'model'} - set(contents)
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}, so it is no whole model file; name another")
    if kind and contents['kind'] != kind:
        raise ValueError(f"{path}: a {contents['kind']}, where a {kind} of folio is wanted; name it with --init_from and "
                         f'take another --out_dir, or start over with --overwrite')
    return contents


def read_torch(path, check=True):
    """What torch.save wrote, plain values alone. Raises ValueError for anything else; see read()."""
    open(path, 'rb').close()  # where it may not be read, that is said
    try:
        zipped = zipfile.is_zipfile(path)  # before torch 1.6 it was none: GPT-2's own pytorch_model.bin
        if zipped and check:
            with zipfile.ZipFile(path) as z:
                if z.testzip():
                    raise zipfile.BadZipFile
        contents = torch.load(path, map_location='cpu', mmap=zipped, weights_only=True)
        # off the map, whose pages count as memory; but nanoGPT's optimizer, twice its weights, stays on disk
        if zipped and check and not (isinstance(contents, dict) and 'optimizer' in contents):
            contents = torch.load(path, map_location='cpu', weights_only=True)
        return contents
    except Exception as error:  # damaged pickles raise nearly all there is
        if isinstance(error, MemoryError) or "can't allocate" in str(error):
            raise MemoryError(error) from None
        raise ValueError(f'{path}: damaged, or not the plain tensors and values that folio reads; save the state_dict() alone, or name another file') from None


# weights in Hugging Face's format, in the order of preference; the json says which shards there are
WEIGHTS = 'model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json'
GPT2_NAMES = 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2'
HAS_SAFETENSORS = importlib.util.find_spec('safetensors') is not None


def local(path):
    """`path`, or where that is not here but reads like a Hub repository's id, owner/name or one of GPT2_NAMES, the folder
    of its model's files: folio's, else Hugging Face's.
    """
    owner = os.path.dirname(path)
    is_id = path in GPT2_NAMES or owner and not (owner == 'out' or os.path.dirname(owner) or os.path.isdir(owner) or
                                                 path.endswith(('.pt', '.pth', '.bin', '.json', '.safetensors')))
    if os.path.exists(path) or not is_id:
        return path
    try:
        from huggingface_hub import snapshot_download  # Gradio brings it
        for kind in ('model*.safetensors', 'pytorch_model*.bin')[::1 if HAS_SAFETENSORS else -1]:
            folder = snapshot_download(path, allow_patterns=['*model*.pt', '*best*.pt', '*ckpt.pt', 'config.json', 'vocab.json',
                                                             'tokenizer.json', f'{kind}*'])
            if any(name.endswith(('.pt', '.safetensors', '.bin')) for name in os.listdir(folder)):
                break
        return folder
    except Exception as error:
        reason = (' '.join(str(error).split()) or type(error).__name__).split('. ')[0][:200]
        raise FileNotFoundError(f'{path}: no such file or folder here, and not to be had from the Hub ({reason}); '
                                f'connect, or name a model file or folder that is here') from None


def find(path):
    """The model file that `path` means: itself, or of a folder model.pt or ckpt.pt, whichever has more steps, or, where
    it has neither, Hugging Face's weights beside a config.json, or the newest run's in its subfolders; see local() for a Hub repository.
    Raises FileNotFoundError where there is none.
    """
    path = local(os.fspath(path))
    if not os.path.isdir(path):
        if os.path.exists(path):
            return path
        raise FileNotFoundError(f'{path}: no such model file or folder; name another, or make one in seconds with '
                                f'python train.py config/quickstart.py')
    files = [os.path.join(path, name) for name in ('model.pt', 'ckpt.pt')]
    files = [file for file in files if os.path.exists(file)]
    if files:
        return max(files, key=lambda file: read(file, check=False)['step']) if len(files) > 1 else files[0]
    for name in WEIGHTS if HAS_SAFETENSORS else WEIGHTS[2:] + WEIGHTS[:2]:
        if os.path.exists(os.path.join(path, name)) and os.path.exists(os.path.join(path, 'config.json')):
            return os.path.join(path, name)
    runs = [entry.path for entry in os.scandir(path) if entry.is_dir()]
    files = [file for run in runs for name in ('model.pt', 'ckpt.pt') if os.path.exists(file := os.path.join(run, name))]
    if files:
        return find(os.path.dirname(max(files, key=os.path.getmtime)))
    raise FileNotFoundError(f'{path}: no model there; name another, or make one in seconds with '
                            f'python train.py config/quickstart.py')


def load(path, device='cpu'):
    """(model, meta) from a model file or folder; see find(). meta is all the file says, with `path`, weights aside.

    The model is in eval mode, its floats in float32. The tokenizer of nanoGPT's char models is without its characters, which
    prepare.get_tokenizer() finds. Raises FileNotFoundError, or ValueError for a file that is not whole.
    """
    path = find(path)
    contents = read(path)
    try:
        return build(contents, device), {**{key: value for key, value in contents.items() if key != 'model'}, 'path': path}
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f'{path}: its parts do not fit together: {str(error)[:300]}') from None


def build(contents, device='cpu'):
    """The GPT that a model file's contents describe, in eval mode; it takes over the weights. Raises much for bad ones."""
    config, weights = GPTConfig(**contents['config']), contents['model']
    with torch.device('meta'):
        model = GPT(config)
    table = weights['wte.weight']
    if len(table) < config.padded_vocab_size:  # floats, without their padding
        # the mean row gives padded ids the mean logit: a zero row's logit 0 would outweigh GPT-2's, all about -100
        rows = table.mean(0, keepdim=True).expand(config.padded_vocab_size - len(table), -1)
        weights['wte.weight'] = torch.cat((table, rows))
    model.load_state_dict(weights, assign=True)
    weights.clear()  # or what the next lines replace would stay in memory
    model.float().to(device)  # 16 bits are for the file alone
    if torch.device(device).type == 'cpu':
        for module in model.modules():
            if isinstance(module, Int4Linear):
                module.pack()
                if module is not model.wte:  # of which rows() reads the plain one
                    module.weight = module.scale = None
    model.trained_context = contents['trained_context']
    return model.eval()


# other projects' files ------------------------------------------------------------------------------------------------

# SHA-256 of GPT-2's 50,256 byte pairs as Hugging Face writes them, a line each: other languages' models have as many
GPT2_VOCABULARY = '3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3'
# what Hugging Face's GPT2Config can change about the network and folio's does not have
ONLY = dict(model_type=('gpt2',), activation_function=('gelu_new', 'gelu_pytorch_tanh', 'gelu_fast'), layer_norm_epsilon=(1e-5,),
            scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,), quantization_config=(None,))


def imported(contents, path):
    """read()'s contents of what another project's file holds: Hugging Face's weights, with a config.json beside them,
    nanoGPT's checkpoint, or bare weights with either's names. Raises ValueError for what is no GPT-2, or not whole, and
    much else for nonsense.
    """
    folder, nanogpt = os.path.dirname(path), 'model_args' in contents
    said = contents['model_args'] if nanogpt else read_json(folder, 'config.json')
    check_network(path, said)
    facts = said.get('folio', {})  # of quantize.py --format=hf
    step = contents.get('iter_num', facts.get('step', 0))
    dataset = (contents.get('config', {}) if nanogpt else facts).get('dataset', '')
    weights = take_weights(path, next((contents[key] for key in ('model', 'model_state_dict', 'state_dict') if key in contents), contents))
    if facts and not facts['config']['bias']:  # Hugging Face's always has them
        weights = {name: w for name, w in weights.items() if not name.endswith('bias')}
    config = config_of(path, said, weights)
    arrange(path, weights, config)

    tokenizer = facts.get('tokenizer') or {'name': 'gpt2' if config.vocab_size == 50257 else 'char', 'vocab_size': config.vocab_size}
    if tokenizer['name'] == 'gpt2' and not has_gpt2_vocabulary(folder):
        raise ValueError(f"{path}: its vocabulary is not GPT-2's, and folio has no other of {config.vocab_size:,} tokens")
    if tokenizer['name'] == 'char' and 'characters' not in tokenizer:  # prepare.get_tokenizer() looks for them there
        tokenizer['folders'] = [folder, os.path.join(folder, '..', 'data', dataset), os.path.join('data', dataset)]
    return {'format_version': FORMAT_VERSION, 'kind': 'model', 'config': dataclasses.asdict(config), 'tokenizer': tokenizer,
            'dataset': dataset, 'trained_context': min(max(facts.get('trained_context', config.block_size), 1), config.block_size),
            'step': operator.index(step), 'losses': facts.get('losses', {}), 'made_by': facts.get('made_by', path), 'model': weights}


def check_network(path, said):
    """Raise ValueError for a config.json's contents that are not of folio's network."""
    for key, values in ONLY.items():
        if said.get(key, values[0]) not in values:
            raise ValueError(f'{path}: no GPT-2: its config says {key} {said[key]!r}, where folio has {values[0]!r}; name another')


def config_of(path, said, weights):
    """The GPTConfig of weights under folio's names: the tensors' own shapes count, and a claim alone takes no memory. Raises
    ValueError where a config.json or nanoGPT's model_args, `said`, says otherwise.
    """
    (V, C), T = map(weights['wte.weight'].size, (0, 1)), weights['wpe.weight'].size(0)
    n_layer = len({name.split('.')[1] for name in weights if name.startswith('h.')})
    for key, value in dict(n_positions=T, block_size=T, n_embd=C, n_layer=n_layer, vocab_size=V).items():
        if said.get(key, value) != value and (key, said[key]) != ('vocab_size', 50257):
            raise ValueError(f'{path}: its config says {key} {said[key]}, and its tensors are of {value}')
    if 50257 < V < 50304:
        say(f"{path}: {V - 50257} token ids past GPT-2's 50,257 are taken for padding")
    n_head = said.get('n_head')
    if n_head is None:
        n_head = max(C // 64, 1)
        say(f'{path}: no config.json says how many heads a layer has; taken for {n_head} of {C // n_head}, as in GPT-2. '
            'Where that is wrong, put a config.json with n_head beside it')
    try:
        n_head = int(n_head)
        return GPTConfig(T, 50257 if 50257 <= V <= 50304 else V, n_layer, n_head, C, bias='ln_f.bias' in weights)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def arrange(path, weights, config):
    """Bring weights into folio's layout, in memory of their own. Raises ValueError where they are not all that belong."""
    with torch.device('meta'):
        shapes = {name: p.shape for name, p in GPT(config).state_dict().items()}
    shapes['wte.weight'] = weights['wte.weight'].shape  # with its padding or without
    transposed = len(weights['h.0.attn.c_attn.weight']) == config.n_embd  # Hugging Face's Conv1D
    for name, shape in shapes.items():
        if name not in weights:
            raise ValueError(f'{path}: not whole: it lacks {name}')
        w = weights[name].t() if transposed and re.search(r'c_\w+\.weight', name) else weights[name]
        if w.shape != shape or not w.is_floating_point():
            raise ValueError(f'{path}: {name} is {tuple(w.shape)} of {str(w.dtype)[6:]}, where floats of {tuple(shape)} belong')
        if not torch.stack(w.aminmax()).isfinite().all():
            raise ValueError(f'{path}: {name} is not finite: the training had blown up; take an earlier model')
        weights[name] = w.clone(memory_format=torch.contiguous_format)
    if set(weights) - set(shapes):
        raise ValueError(f"{path}: {min(set(weights) - set(shapes))} is not GPT-2's")


@functools.cache  # once, however often a file is read
def say(message):
    print(message, file=sys.stderr)


def take_weights(path, source):
    """The weights of a GPT-2, with folio's names, out of `source`, which is empty then. Raises ValueError for another network."""
    weights = {re.sub(r'^(_orig_mod\.|module\.|transformer\.)*', '', name): w for name, w in source.items() if isinstance(w, torch.Tensor)}
    source.clear()  # or what is transposed later would stay in memory
    head = weights.pop('lm_head.weight', None)
    weights = {name: w for name, w in weights.items()  # no heads for other ends, nor the masks that old versions kept
               if re.match(r'(wte|wpe|ln_f|h\.\d+)\.', name) and not name.endswith(('.attn.bias', '.attn.masked_bias'))}
    missing = {'wte.weight', 'wpe.weight', 'h.0.attn.c_attn.weight'} - set(weights)
    if missing:
        raise ValueError(f"{path}: no GPT-2: it lacks {', '.join(sorted(missing))}; name another")
    if head is not None and not torch.equal(head, weights['wte.weight']):
        raise ValueError(f"{path}: no GPT-2: its lm_head.weight differs from its wte.weight, and GPT-2's head is its token table")
    return weights


def read_shards(path):
    """{name: tensor} of a .safetensors file, or of all shards that an index.json names, each in memory of its own."""
    folder, file = os.path.split(path)
    if file.endswith('.json'):
        weights = {}
        for shard in sorted(set(read_json(folder, file).get('weight_map', {}).values())):
            shard = os.path.join(folder, os.path.basename(shard))
            if not os.path.isfile(shard):
                raise ValueError(f'{path}: {shard} is not there; get it again')
            weights.update(read_shards(shard) if shard.endswith('.safetensors') else read_torch(shard))
        return weights
    if not HAS_SAFETENSORS:
        raise ValueError(f'{path}: pip install safetensors, which reads this')
    open(path, 'rb').close()  # as in read_torch
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, 'pt') as f:
            names, weights = f.keys(), {}
        for name in names:  # opened for each anew: what was read of a map takes memory until it is closed
            with safe_open(path, 'pt') as f:
                weights[name] = f.get_tensor(name).clone()
        return weights
    except SafetensorError as error:
        raise ValueError(f'{path}: damaged ({error}); get it again') from None


def read_json(folder, file):
    """The dict in a JSON file, empty where there is none. Raises ValueError for a damaged one."""
    path = os.path.join(folder, file)
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding='utf-8') as f:
            return dict(json.load(f))
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f'{path} is damaged, no JSON of names and values') from None


def has_gpt2_vocabulary(folder):
    """Whether the tokenizer's files beside a model of GPT-2's size, where there are any, hold GPT-2's vocabulary."""
    vocabulary = read_json(folder, 'vocab.json') or read_json(folder, 'tokenizer.json').get('model', {}).get('vocab')
    if not vocabulary:
        return True
    tokens = sorted(vocabulary, key=vocabulary.get)[:50256]
    return hashlib.sha256('\n'.join(tokens).encode()).hexdigest() == GPT2_VOCABULARY
