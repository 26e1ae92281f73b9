"""
Train a GPT-2: from scratch, from where a run stopped, or from another model's weights.

$ python train.py config/quickstart.py                      # byte pairs, 0.7M parameters, a minute on a CPU
$ python train.py config/mine.py --input=my.txt             # your text; picks vocabulary and model for it
$ python train.py config/shakespeare.py --batch_size=32     # GPT-2 small (124M) until its loss is under 0.1
$ python train.py config/shakespeare.py --init_from=resume  # goes on after Ctrl-C, a kill or a power cut
$ python train.py config/finetune.py --init_from=gpt2       # from OpenAI's weights, or from another model
$ python train.py config/bench.py                           # tokens/s, MFU and memory, in under a minute
$ torchrun --nproc_per_node=8 train.py config/shakespeare.py --init_from=auto --batch_size=64  # eight GPUs
"""
import time
COMMAND_BEGAN = time.time()  # torch takes seconds to import

import contextlib
import datetime
import functools
import math
import os
import shlex
import shutil
import signal
import sys

import numpy as np
import torch
import torch.distributed as dist

from config import configure, end, fail, given, merge, on_signals
from model import (GPT, GPTConfig, capture, device_name, duration, keep_freed_memory, load, or_none,
                   pick_device, pick_dtype, product, read, save, split_loss)
from prepare import LIMITS, FolderLock, bits_per_nat, check_data, get_tokenizer, load_data, prepare


# -- optimizer -----------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalized update: every direction of a matrix is learnt at the same rate.

    For 2-D weights; Keller Jordan's, https://kellerjordan.github.io/posts/muon/. The update is scaled by
    0.2·√max(rows, columns), which makes it as large as AdamW's, so that one learning rate serves both
    (Moonlight, https://arxiv.org/abs/2502.16982). c_attn (3C, C) counts as three matrices: q, k and v.
    dtype is the type of the products; bfloat16 is slow on a CPU without bfloat16 units.
    """
    def __init__(self, groups, lr, momentum=0.95, dtype=torch.bfloat16):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=0.0))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights, lr = group['params'], group['lr']
            for p in weights:
                self.state[p] = self.state[p] or {'momentum': torch.zeros_like(p)}
            averages, grads = [self.state[p]['momentum'] for p in weights], [p.grad for p in weights]
            torch._foreach_lerp_(averages, grads, 1 - group['momentum'])
            torch._foreach_lerp_(grads, averages, group['momentum'])  # Nesterov; overwrites the gradients
            torch._foreach_mul_(weights, 1 - lr * group['weight_decay'])
            same_shape = {}  # matrices of one shape are orthogonalized as one batch
            for p, grad in zip(weights, grads):
                parts = 3 if p.size(0) == 3 * p.size(1) else 1
                for pair in zip(p.chunk(parts), grad.chunk(parts)):
                    same_shape.setdefault(pair[0].shape, []).append(pair)
            for shape, pairs in same_shape.items():
                matrices, grads = zip(*pairs)
                # not float16 yet, in which a small gradient would become 0; orthogonalize() scales it up
                dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
                stacked = grads[0].new_empty(len(grads), *shape, dtype=dtype)
                torch._foreach_copy_(stacked.unbind(), grads)
                updates = orthogonalize_in_ranks(stacked, self.dtype).unbind()
                torch._foreach_add_(matrices, updates, alpha=-0.2 * max(shape)**0.5 * lr)


def orthogonalize_in_ranks(x, dtype):
    """orthogonalize(x (n, rows, columns)); each rank does its share of the n and receives the rest."""
    if not dist.is_initialized():
        return orthogonalize(x, dtype)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -len(x) % ranks))  # to a multiple of ranks
    whole = torch.empty_like(padded, dtype=dtype)
    dist.all_gather_into_tensor(whole, orthogonalize(padded.chunk(ranks)[rank], dtype).contiguous())
    return whole[:len(x)]


# Polar Express, https://arxiv.org/abs/2505.16932: three of these train as well as Muon's own five, and a step
# of a small model takes three quarters of the time
POLYNOMIALS = (8.28721, -23.59589, 17.30039), (4.10706, -2.94785, 0.54484), (3.94869, -2.9089, 0.55182)


def orthogonalize(x, dtype=torch.float32):
    """x (n, rows, columns) with the singular values of each matrix brought near 1, by odd polynomials."""
    if x.size(1) > x.size(2):
        return orthogonalize(x.mT, dtype).mT
    x = (x / (1.02 * x.norm(dim=(1, 2), keepdim=True) + 1e-30)).to(dtype)  # all singular values under 1
    for a, b, c in POLYNOMIALS:
        # a + b·gram + c·gram² is c·(gram + b/2c)² + a - b²/4c, which needs no copy of gram
        gram = x @ x.mT
        gram.diagonal(dim1=1, dim2=2).add_(b / (2 * c))
        polynomial = torch.baddbmm(gram, gram, gram, beta=0, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a - b * b / (4 * c))
        x = polynomial @ x
    return x


def step_together(optimizers, scaler, norm):
    """Step all optimizers, whose gradients are unscaled, or none if their common norm is not finite.

    A GradScaler skips only the optimizer whose own gradients are infinite. Clipping has divided the others'
    by that norm too, so they would step with zeros or NaN.
    """
    if not scaler.is_enabled() or norm.isfinite():
        for one in optimizers:
            scaler.step(one)
    scaler.update()


def cosine(start, end, x):
    """From start to end along half a cosine wave, for x from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * x)) / 2


def rate_at(step, steps, schedule, peak, least, warmup, beta1):
    """(learning rate, beta1) of a step, counted from 0, where the schedule ends after `steps`."""
    if schedule == 'onecycle':  # torch.optim.lr_scheduler.OneCycleLR with its defaults, which cycle beta1 too
        top = 0.3 * steps - 1
        if step <= top:
            return cosine(peak / 25, peak, step / top), cosine(0.95, 0.85, step / top)
        x = min((step - top) / (steps - 1 - top), 1.0)
        return cosine(peak, peak / 25 / 1e4, x), cosine(0.85, 0.95, x)
    if step < warmup:
        return peak * (step + 1) / warmup, beta1
    x = min((step - warmup) / max(steps - warmup, 1), 1.0)
    rates = {'cosine': cosine(peak, least, x), 'linear': least + (1 - x) * (peak - least), 'constant': peak}
    return rates[schedule], beta1


# settings chosen by the text's size: {least training tokens: values}; max_iters is for 32 windows a step
CHOSEN = 'n_layer', 'n_embd', 'block_size', 'dropout', 'weight_decay', 'max_iters'
SIZES = {1_000_000: (4, 128, 128, 0.0, 0.1, 1000), 150_000: (4, 192, 64, 0.1, 0.3, 1150),
         100_000: (4, 192, 64, 0.2, 0.5, 600), 0: (2, 128, 64, 0.2, 1.0, 400)}


def settings_for(tokens, width=0):
    """Settings for a text of this many training tokens, which take up to nine minutes on two CPU cores.

    A small text is read often, so it gets a small model, dropout and a strong weight decay
    (https://arxiv.org/abs/2305.16264). For a large one the time is the limit: a wider model would see fewer
    tokens (https://arxiv.org/abs/2203.15556).
    """
    chosen = dict(zip(CHOSEN, next(SIZES[least] for least in SIZES if tokens >= least)))
    width = width or chosen['n_embd']
    # n_head divides the width; a head has at least 64 channels, or all of a smaller width
    return {**chosen, 'n_embd': width, 'n_head': math.gcd(width, max(width // 64, 1))}


# -- batches -------------------------------------------------------------------------------------------------

class Windows:
    """A split, cut into windows of T tokens; each is read with the token after it."""

    def __init__(self, tokens, T, device, seed=0, shift=False):
        self.tokens, self.T, self.device, self.seed, self.shift = tokens, T, device, seed, shift
        self.count = (len(tokens) - 1) // T  # windows an epoch

    @functools.lru_cache(maxsize=1)
    def starts(self, epoch):
        """First tokens (count,) of the windows of an epoch, in a random order."""
        rng = np.random.default_rng((self.seed, epoch))
        starts = rng.permutation(self.count)
        starts *= self.T  # in place: 10 billion tokens have 10 million windows of 1024
        starts += self.shift * rng.integers(self.T)
        starts[starts >= len(self.tokens) - self.T] = 0  # past the end: take the first one instead
        return starts

    def batch(self, first, rows):
        """Inputs and targets (B, T) of `rows` windows from number `first` on, counted over all epochs."""
        return self.at([self.starts(i // self.count)[i % self.count] for i in range(first, first + rows)])

    def at(self, starts):
        """Inputs and targets, each (B, T), on the device, of the windows that begin at `starts` (B,)."""
        ids = torch.from_numpy(self.tokens[np.add.outer(starts, np.arange(self.T + 1))].astype(np.int64))
        if self.device.startswith('cuda'):
            ids = ids.pin_memory()  # or each step would wait for the GPU
        ids = ids.to(self.device, non_blocking=ids.is_pinned())  # (B, T + 1)
        return ids[:, :-1], ids[:, 1:].contiguous()


# -- what is measured ----------------------------------------------------------------------------------------

# Dense 16-bit tensor TFLOP/s by torch's name of the GPU without "NVIDIA", from NVIDIA's data sheets, whose
# sparse figures are halved. The GeForce card's is the whitepaper's, with float32 accumulation.
PEAK_TFLOPS = {'B200': 2250, 'H200': 989, 'H100 80GB HBM3': 989, 'H100 NVL': 835, 'H100 PCIe': 756,
               'A100-SXM4-80GB': 312, 'A100-SXM4-40GB': 312, 'A100 80GB PCIe': 312, 'A100-PCIE-40GB': 312,
               'L40S': 362, 'L4': 121, 'A10G': 70, 'Tesla T4': 65, 'GeForce RTX 4090': 165}


def peak_flops(device, dtype, measure):
    """Peak FLOP/s: the data sheet's for 16 bits; else, with `measure`, that of a timed product; else 0."""
    name = device_name(device).removeprefix('NVIDIA ') if dtype != torch.float32 else ''
    if name in PEAK_TFLOPS or not measure:
        return 1e12 * PEAK_TFLOPS.get(name, 0)
    from torch.utils.benchmark import Timer
    a = torch.ones(2 * [4096 if device.startswith('cuda') else 1024], device=device, dtype=dtype)
    timer = Timer('product(a, a)', globals=dict(product=product, a=a), num_threads=torch.get_num_threads())
    return 2 * len(a)**3 / timer.blocked_autorange(min_run_time=0.3).median


def peak_memory(device):
    """The most memory used so far, in GB: the GPU's, or this process's (0 on Windows)."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_reserved() / 1e9  # a graph's memory does not count as allocated
    if os.name != 'posix':
        return 0.0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == 'darwin' else 1e6)


def print_sample(model, tokenizer, seed):
    ids = torch.tensor([[tokenizer.start]])
    written = [step.item() for step in model.generate(ids, 100, temperature=0.8, top_k=50, seed=seed)]
    print('  | ' + tokenizer.decode_bytes(written).decode('utf-8', 'replace').strip().replace('\n', '\n  | '))


if __name__ == '__main__':
    # run
    out_dir = 'out'                  # folder of checkpoints, model and log; empty = write nothing
    init_from = 'scratch'            # scratch, resume, gpt2, a path, a Hub id; auto, auto:gpt2: resume first
    overwrite = False                # start over where a run already is
    # data
    input = 'input.txt'              # text, prepared if data/<dataset>/ is not there: a file, folder or glob
    dataset = 'shakespeare'          # tokens come from data/<dataset>/
    tokenizer = 'gpt2'               # gpt2, bpe (learnt from the text) or char
    vocab_size = 0                   # ids of a bpe vocabulary; 0 = 1,024 to 4,096 by the text's size
    val_fraction = 0.1               # share of the text kept for validation; 0 = none
    # model
    n_layer = 12                     # blocks; 0 = by the text's size, like the next three and max_iters
    n_head = 12                      # attention heads per block
    n_embd = 768                     # width, a multiple of n_head
    block_size = 1024                # positions that the model has, tokens
    dropout = 0.0                    # share of activations dropped; helps where a small text is read often
    bias = True                      # biases in linear layers and norms, as GPT-2; False is a little faster
    # batch
    batch_size = 8                   # windows per forward pass; more is faster until memory is full
    seq_len = 0                      # tokens per window; 0 = block_size
    gradient_accumulation_steps = 1  # forward passes per step: a larger batch in the same memory
    shift_windows = True             # draw each epoch's first cut; generalises better than fixed windows
    # optimizer
    optimizer = 'adamw'              # adamw, or muon for the blocks' matrices (twice the progress a step)
    learning_rate = 6e-4             # the highest
    min_lr = 6e-5                    # where cosine and linear end
    schedule = 'cosine'              # cosine, onecycle (torch's OneCycleLR; sets beta1 too), linear, constant
    warmup_iters = 100               # steps of linear warm-up: (i + 1) / warmup_iters of the rate at step i
    lr_decay_iters = 0               # step at which the schedule ends; 0 = max_iters
    weight_decay = 0.1               # of matrices, not of biases and norms
    beta1 = 0.9                      # decay of AdamW's mean gradient
    beta2 = 0.95                     # decay of its mean squared gradient; nearer 1 for small batches
    grad_clip = 1.0                  # greatest gradient norm; 0 = no clipping
    # stopping
    max_iters = 5000                 # steps; 0 = chosen by the text's size
    loss_threshold = 0.0             # stop when an epoch's mean (at most 100 steps) is under it; 0 = never
    patience = 0                     # stop after this many evaluations without a better one; 0 = never
    max_minutes = 0.0                # minutes until it stops, ready to resume; 0 = never
    # rhythm, in steps; 0 = never
    log_interval = 10                # a line here and in out_dir/log.csv
    eval_interval = 250              # validation, and out_dir/best.pt where it is the best so far
    eval_iters = 20                  # batches per evaluation of a split
    checkpoint_interval = 500        # the whole state to out_dir/ckpt.pt, saved every ten minutes too
    sample_interval = 500            # print a sample of the model's text
    final_eval_tokens = 0            # tokens of each split in the losses at the end; 0 = all
    # system
    device = 'auto'                  # auto, cpu, cuda, cuda:1, mps
    dtype = 'auto'                   # auto (bfloat16 where the chip has it), float32, bfloat16, float16
    compile = 'auto'                 # auto (on CUDA), True or False: a minute of compiling for faster steps
    gradient_checkpointing = False   # run each forward again in backward: a third slower, much less memory
    measure_peak = False             # time a product where the chip's peak FLOP/s is unknown, to print MFU
    deterministic = False            # repeat bit for bit on CUDA too, somewhat slower
    seed = 1337                      # of weights, order of windows, dropout
    settings = configure(globals(), dict(
        LIMITS, device=pick_device, batch_size=(1, 2**16), gradient_accumulation_steps=(1, 2**16),
        optimizer=('adamw', 'muon'), learning_rate=(0, 1e3), beta1=(0, 0.999999), beta2=(0, 0.99999999),
        schedule=('cosine', 'onecycle', 'linear', 'constant'), max_iters=(0, 10**9), eval_iters=(1,),
        dtype=('auto', 'float32', 'bfloat16', 'float16'), compile=('auto', 'True', 'False')),
        'lower --batch_size and raise --gradient_accumulation_steps, or give --gradient_checkpointing')

    # -- the run: a new one, the one in out_dir, or one that starts from another model -----------------------
    keep_freed_memory()
    rank, ranks = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))  # torchrun's
    master = rank == 0  # the rank that prints and writes
    errors = sys.stderr if master else open(os.devnull, 'w', encoding='utf-8')
    sys.stdout = sys.stdout if master else errors
    lock = FolderLock(out_dir) if master and out_dir else None  # until the process ends
    files = {name: os.path.join(out_dir, name) for name in ('ckpt.pt', 'best.pt', 'model.pt', 'log.csv')}
    there = [path for path in files.values() if out_dir and os.path.exists(path)]
    resumable, start, replace = files['ckpt.pt'] in there, init_from, overwrite
    if start.split(':')[0] == 'auto':
        start = 'resume' if resumable else start[5:] or 'scratch'
        replace |= files['model.pt'] not in there  # a run killed before its first checkpoint starts again
    source = {}  # the contents of the model file that the run goes on from, or starts from
    shape = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias')
    # a 0 gives way to a checkpoint's or another model's value; an empty input is not set
    given.difference_update([key for key in (*shape[:4], 'max_iters', 'input') if not settings[key]])
    if start == 'resume':
        source = resumable and read(files['ckpt.pt'])
        if not source or source['kind'] != 'checkpoint':
            fail(f'{out_dir} has no ckpt.pt of a run; use --init_from=auto, or another --out_dir')
        given.update(('out_dir', 'init_from', 'overwrite'))  # these are never taken from the checkpoint
        merge(settings, globals(), source['settings'], (*shape, 'dataset', 'tokenizer', 'optimizer'), out_dir)
    elif there and not replace:
        ways = '--init_from=resume goes on, ' * resumable + '--overwrite replaces it'
        fail(f'{out_dir} has a run: {ways}, another --out_dir keeps it')
    elif start != 'scratch':
        parent, source = load(start)
        if parent.config.quantized:
            fail(f"{source['path']}: {parent.config.quantized} cannot be trained; name the float model")
        print(f"{source['path']}: {parent.num_params():,} parameters, step {source['step']:,}", file=errors)
        source.update(model=parent.state_dict(), data={'tokenizer': source['tokenizer']})
        kept = {key: vars(parent.config)[key] for key in shape} | {'tokenizer': source['tokenizer']['name']}
        merge(settings, globals(), kept, kept, start)
    chip = pick_device(device)
    kind = chip.split(':')[0]
    if kind == 'cuda':
        torch.cuda.set_device(chip)  # before the next calls, which would open a context on GPU 0
    if patience and not eval_interval:
        fail('--patience needs evaluations, but --eval_interval is 0; set --eval_interval', 2)
    # ranks share the accumulation where it divides evenly, else the batch
    windows_per_step = batch_size * gradient_accumulation_steps
    accumulation = gradient_accumulation_steps // (1 if gradient_accumulation_steps % ranks else ranks)
    rows, left_over = divmod(windows_per_step, accumulation * ranks)  # windows of a rank's forward pass
    if left_over:
        fail(f'{ranks} ranks cannot share batch_size {batch_size}; make it a multiple of {ranks}', 2)

    agent_store = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'  # the store outlives a restart
    # each node counts its own restarts, so their stores' prefixes would differ
    if agent_store and os.getenv('GROUP_WORLD_SIZE') != '1' and os.getenv('TORCHELASTIC_MAX_RESTARTS') != '0':
        fail('nodes could not meet again: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or --max-restarts=0', 2)

    # -- the data --------------------------------------------------------------------------------------------
    if master and not os.path.exists(f'data/{dataset}/train.bin'):
        prepare(input, dataset, tokenizer, val_fraction, vocab_size=vocab_size, known=source.get('tokenizer'),
                keep=True)
    if ranks > 1:
        # a day, because rank 0 may prepare a large corpus meanwhile
        store = next(dist.rendezvous('env://', rank, ranks, timeout=datetime.timedelta(days=1)))[0]
        # the prefix hides the addresses that the attempt before left in the store
        store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'] if agent_store else '', store)
        store.set(f'rank {rank}', 'has its data')
        store.wait(['rank 0'])
        backend, gpu = ('nccl', torch.device(chip)) if kind == 'cuda' else ('gloo', None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, device_id=gpu)
    train_tokens, val_tokens, data_meta = load_data(dataset)
    here = repr((start, source.get('step', 0), settings, data_meta))
    if ranks > 1 and store.compare_set('here', '', here).decode() != here:  # the first rank to come sets it
        fail(f'rank {rank} has other settings, other data or another run than the first; give all the same')
    if 0 in (n_layer, n_head, n_embd, block_size, max_iters):
        # the settings left at 0, and weight_decay unless it is given or the weights are not new
        taken = {key: value for key, value in settings_for(len(train_tokens), n_embd).items()
                 if key not in given and (not settings[key] or key == 'weight_decay' and not source)}
        merge(settings, globals(), taken, (), '')
        print(f'chosen for {len(train_tokens):,} training tokens:', *(f'{k}={settings[k]}' for k in taken))
    if seq_len > block_size:
        fail(f'--seq_len={seq_len}: the model has {block_size} positions; lower it, or take 0 for all', 2)
    T, tok = seq_len or block_size, get_tokenizer(data_meta['tokenizer'])
    try:
        check_data(dataset, data_meta, {key: settings[key] for key in given})
        config = GPTConfig(block_size, tok.vocab_size, n_layer, n_head, n_embd, dropout, bias)
    except ValueError as error:
        fail(error, 2)
    if {**data_meta, **source.get('data', {})} != data_meta:  # an older checkpoint has fewer keys
        fail(f"data/{dataset} is not the model's text and tokenizer; name another --dataset or --out_dir")
    if len(train_tokens) < T + 1:
        fail(f'data/{dataset}: {len(train_tokens):,} tokens for windows of {T:,}; lower seq_len or add text')
    train = val = Windows(train_tokens, T, chip, seed, shift_windows)
    if val_tokens is not None and len(val_tokens) > 1:  # nothing predicts the first token
        val = Windows(val_tokens, T, chip)
    bits = bits_per_nat(val.tokens, tok, data_meta.get('bytes', {}).get('train' if val is train else 'val'))
    epoch_steps = max(train.count // windows_per_step, 1)

    # -- the model and the optimizers ------------------------------------------------------------------------
    compute_dtype = pick_dtype(chip, dtype)
    autocast = functools.partial(torch.autocast, kind, compute_dtype, enabled=compute_dtype != torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = dtype != 'float32'
    if deterministic:
        os.environ.update(CUBLAS_WORKSPACE_CONFIG=':4096:8', TORCHINDUCTOR_DETERMINISTIC='1')
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    # raw_model is the one to save: DistributedDataParallel prefixes the names
    model = raw_model = GPT(config).to(chip)
    raw_model.trained_context = max(T, source.get('trained_context', 0))
    raw_model.gradient_checkpointing = gradient_checkpointing
    if source:
        raw_model.load_state_dict(source['model'])
    groups = raw_model.param_groups(weight_decay)  # the first holds the blocks' matrices, Muon's share
    muon = [Muon([groups.pop(0)], lr=learning_rate, dtype=compute_dtype)] if optimizer == 'muon' else []
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True), *muon]
    scaler = torch.amp.GradScaler(kind, enabled=compute_dtype == torch.float16)
    rate = functools.partial(rate_at, steps=lr_decay_iters or max_iters, schedule=schedule, beta1=beta1,
                             peak=learning_rate, least=min_lr, warmup=warmup_iters)
    how = str(compute_dtype).removeprefix('torch.')

    def learn(x, y):
        """A batch's (B, T) part of the step's loss; writes its gradients, or with accumulation adds them."""
        if accumulation == 1:
            raw_model.zero_grad()  # captured too, so that a graph writes new gradients, at its own addresses
        with autocast():
            loss = model(x, y) / accumulation
        scaler.scale(loss).backward()
        return loss.detach()

    graph = None  # learn() as a CUDA graph
    if compile == 'True' or compile == 'auto' and kind == 'cuda':
        print('compiling, for up to a minute', file=errors)
        began = time.time()
        raw_model.compile(dynamic=False)
        if or_none(learn, *train.batch(0, rows)) is None:
            raw_model.compile(disable=True)
        if kind == 'cuda' and ranks == 1 and not gradient_checkpointing:
            # 32 x 128 tokens of GPT-2 small take an H100 12 ms, and 28 when Python launches each kernel
            graph = or_none(capture, learn, *train.batch(0, rows))
            torch.cuda.empty_cache()  # frees the warm-up's memory, which the graph does not use
            torch.cuda.reset_peak_memory_stats()
        how += f', compiled in {time.time() - began:.0f} s'
    if ranks > 1:
        model = torch.nn.parallel.DistributedDataParallel(raw_model)

    # -- the state of the run, without weights and optimizers ------------------------------------------------
    # logged_step is -1 for a run that starts from another model, so that step 0 is evaluated
    state = dict(step=0, tokens=0, seconds=0.0, logged_step=-1 if source else 0, loss_sum=0.0, log_bytes=0,
                 recent=[], rows=[], grad_norm=0.0, first_loss=0.0, best_loss=math.inf, passed={},
                 losses={}, best_val=math.inf, best_val_step=0, best_kept=True, bad_evals=0)
    if start == 'resume':
        state.update(source['state'])
        for one, kept in zip(optimizers, source['optimizers']):  # keeps this command's rates and decay
            one.load_state_dict({'state': kept['state'], 'param_groups': one.state_dict()['param_groups']})
        scaler.load_state_dict(source['scaler'] or scaler.state_dict())
    facts = dict(tokenizer=data_meta['tokenizer'], trained_context=raw_model.trained_context, dataset=dataset,
                 made_by='train.py ' + ' '.join(sys.argv[1:]))
    source = parent = kept = None  # frees their memory
    if master and out_dir:
        # room for two checkpoints, the old and the new: weights and up to two averages in float32 each
        free, need = shutil.disk_usage(out_dir).free, 2 * 12 * raw_model.num_params()
        if free + sum(map(os.path.getsize, there)) < need:
            fail(f'{out_dir}: {free / 1e6:,.0f} MB are free, and a run needs {need / 1e6:,.0f} MB; make room')
        for path in there if start != 'resume' else ():
            os.remove(path)

    # -- what is saved, logged and evaluated -----------------------------------------------------------------
    # one process stops as soon as it catches a signal; several ranks first agree, on GPUs within ten steps
    caught, pending, flags = [], [], (False, False)  # signals; (loss, norm) of steps; (signalled, time over)
    unsaved = set()  # names of the files whose last write failed
    peak, flops = ranks * peak_flops(chip, compute_dtype, measure_peak), raw_model.flops_per_token(T)

    def try_to_write(name, write, *args, **more):
        """Write one of the run's files; if that fails, print why, note it in `unsaved`, and go on."""
        unsaved.discard(name)
        if master and out_dir:
            try:
                write(files[name], *args, **more)
            except OSError as error:
                unsaved.add(name)
                print(f"step {state['step']:,}: {name}: {error}", file=errors)

    def keep(name, **more):
        """Write one of the run's model files; see save()."""
        try_to_write(name, save, config, raw_model.state_dict(), step=state['step'], **facts, **more)

    def keep_checkpoint():
        keep('ckpt.pt', kind='checkpoint', losses=state['losses'], settings=settings, data=data_meta,
             state=state, optimizers=[one.state_dict() for one in optimizers], scaler=scaler.state_dict())

    def collect():
        """Bring the pending steps' losses and gradient norms from the device into the state.

        Between these calls one process trains without waiting for the device, except in float16. Ends the
        process if a loss is not finite, or a norm, which may be infinite in float16 alone.
        """
        milestones = 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, loss_threshold
        values = torch.stack([torch.stack(pair) for pair in pending]).tolist() if pending else []
        pending.clear()
        for step, (loss, norm) in enumerate(values, state['step'] - len(values) + 1):
            if not math.isfinite(loss) or not (scaler.is_enabled() or math.isfinite(norm)):
                fail(f'loss {loss}, norm {norm}, step {step}: diverged; try a lower --learning_rate')
            state.update(first_loss=state['first_loss'] or loss, best_loss=min(state['best_loss'], loss),
                         recent=(state['recent'] + [loss])[-min(epoch_steps, 100):], grad_norm=norm,
                         passed={str(mark): step for mark in milestones if loss < mark} | state['passed'],
                         loss_sum=state['loss_sum'] + loss)

    def log_line(step, losses, speed, left):
        """Print a line and append a row to log.csv; the loss is the mean since the last row."""
        loss, lr = state['loss_sum'] / (step - max(state['logged_step'], 0)), rate(step - 1)[0]
        mfu = f'  mfu {speed * flops / peak:.0%}' if peak else ''
        print(f"step {step:,}/{max_iters:,}  loss {loss:.4f}  best {state['best_loss']:.4f}  norm "
              f"{state['grad_norm']:.2f}  lr {lr:.2e}  {speed:,.0f} tok/s{mfu}  {peak_memory(chip):.1f} GB  "
              f'{left} left', flush=True)
        row = dict(step=step, loss=loss, grad_norm=state['grad_norm'], lr=f'{lr:.6e}', train_loss='',
                   val_loss='', tokens_per_s=speed, seconds=state['seconds'], val_bpb='') | losses
        row = {key: f'{x:.6f}' if type(x) is float else str(x) for key, x in row.items()}
        try_to_write('log.csv', write_rows, row)

    def write_rows(path, *new):
        """Append the new rows to log.csv, after any that could not be written before."""
        state['rows'] += new
        if state['rows']:
            with open(path, 'a+', encoding='utf-8', newline='\n') as f:
                # cut off half a row that a full disk left, and the rows after a resumed run's checkpoint
                f.truncate(min(state['log_bytes'], f.tell()))
                f.seek(0)
                header = f.readline() or ','.join(state['rows'][0]) + '\n'  # an older log has no val_bpb
                rows = [','.join([*row.values()][:header.count(',') + 1]) + '\n' for row in state['rows']]
                f.write((header if f.tell() == 0 else '') + ''.join(rows))  # one write for all
                state['log_bytes'] = f.tell()  # this flushes, so a full disk shows here
                state['rows'].clear()

    def evaluate(split):
        """Mean loss of eval_iters batches spread evenly over a split, always the same; ranks share them out.

        A split with fewer windows is taken whole. A signal cuts the evaluation short.
        """
        count = eval_iters * batch_size
        with torch.no_grad(), autocast():
            if split.count <= count:
                return split_loss(raw_model, split.tokens, T)
            parts = (np.linspace(0, split.count - 1, count).astype(np.int64) * T).reshape(-1, rows)
            losses = (raw_model(*split.at(part)) for part in parts[rank::ranks] if ranks > 1 or not caught)
            total = sum(losses, torch.zeros((), device=chip))
        if ranks > 1:
            dist.all_reduce(total)
        return total.item() / len(parts)

    def judge(step, losses):
        """Print an evaluation's losses and note them in the state, and whether they are the best so far."""
        val_loss, better = losses['val_loss'], losses['val_loss'] < state['best_val']
        print(f"evaluation at step {step:,}: train {losses['train_loss']:.4f}, validation {val_loss:.4f}, "
              f"{losses['val_bpb']:.3f} bits per byte{', the best so far' if better else ''}", flush=True)
        state.update(losses=losses, bad_evals=state['bad_evals'] + 1)
        if better:
            state.update(best_val=val_loss, best_val_step=step, bad_evals=0)

    def catch(number, frame):
        """Note the first signal, for the loop to save and end; a second one ends the process at once."""
        caught.append(number)
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')  # `| tee` or the terminal may be gone
        for deadly in (signal.SIGINT, signal.SIGTERM):  # not SIGHUP: a terminal that closes may send two
            signal.signal(deadly, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # not print(), which may be at work just now
            os.write(errors.fileno(), b'\nsaving and ending soon; a second Ctrl-C ends it at once, unsaved\n')

    # -- the banner ------------------------------------------------------------------------------------------
    print(f'{raw_model.num_params():,} parameters on {ranks} x {device_name(chip)}, {how}')
    held_out = 'the training split stands in' if val is train else f'{len(val_tokens):,} tokens'
    print(f'data/{dataset}: {len(train_tokens):,} training tokens; validation: {held_out}; {batch_size} x '
          f'{T} x {gradient_accumulation_steps} tokens a step, {epoch_steps:,} steps an epoch')
    print(f"{out_dir or 'nothing written'}: {start}, from step {state['step']:,} to step {max_iters:,}")
    if kind == 'cuda' and not deterministic:
        print('a resumed run repeats within rounding; with --deterministic bit for bit, somewhat slower')

    # -- the loop --------------------------------------------------------------------------------------------
    began, seconds, first_step = time.time(), state['seconds'], state['step']
    rhythm = log_interval, eval_interval, checkpoint_interval, sample_interval, 10 * (loss_threshold > 0)
    last_time, last_save, last_tokens, signalled, over = began, began, state['tokens'], False, False
    on_signals(catch)
    while True:
        step, stop = state['step'], ''  # steps done, and why to stop
        log, evaluation, saving, sampling, looking = due = [every and step % every == 0 for every in rhythm]
        saving |= 0 < checkpoint_interval and time.time() - last_save > 600
        if any(due) or saving or signalled or over or step >= max_iters:
            collect()
        now, mean = time.time(), sum(state['recent']) / max(len(state['recent']), 1)
        state['seconds'] = seconds + now - began
        left = duration((now - began) / max(step - first_step, 1) * (max_iters - step))
        if step >= max_iters:
            stop = f'max_iters {max_iters:,} reached'
        elif looking and len(state['recent']) == min(epoch_steps, 100) and mean < loss_threshold:
            stop = f'loss {mean:.6f} under {loss_threshold}'

        if step > state['logged_step'] and (log or evaluation or stop):
            losses = {'train_loss': evaluate(train), 'val_loss': evaluate(val)} if evaluation else {}
            if losses and caught and ranks == 1:
                break  # a resumed run evaluates this step again
            if losses:
                losses['val_bpb'] = losses['val_loss'] * bits
                judge(step, losses)
            if step:
                log_line(step, losses, (state['tokens'] - last_tokens) / max(now - last_time, 1e-9), left)
            state.update(loss_sum=0.0, logged_step=step)
            last_time, last_tokens = now, state['tokens']
        elif kind == 'cpu' and step == first_step + 3 and now - began > 10:
            print(f'at this rate it takes {left}; config/quickstart.py takes a minute', flush=True)
        if state['best_val'] < math.inf and step == state['best_val_step']:  # just judged, or resumed at it
            keep('best.pt', losses=state['losses'])
            state['best_kept'] = 'best.pt' not in unsaved  # else the file may be of an older step
        if 0 < patience <= state['bad_evals']:
            stop = stop or f'no better validation loss in {patience} evaluations'
        if stop or over or signalled:
            break
        if sampling and step > first_step:
            print_sample(raw_model, tok, seed)
        if saving and step > first_step:
            keep_checkpoint()
            last_save = time.time()
        last_time += time.time() - now  # tokens/s is of training alone

        lr, beta = rate(step)
        for group in (group for one in optimizers for group in one.param_groups):
            group.update({'lr': lr, 'betas': (beta, beta2)} if 'betas' in group else {'lr': lr})
        if accumulation > 1:
            raw_model.zero_grad(set_to_none=graph is None)  # a graph adds to gradients at fixed addresses
        loss = torch.zeros((), device=chip)
        for micro_step in range(accumulation):
            if dropout:
                torch.manual_seed(hash((seed, step, micro_step, rank)))  # a resumed run drops the same
            x, y = train.batch(step * windows_per_step + (micro_step * ranks + rank) * rows, rows)
            model.require_backward_grad_sync = micro_step == accumulation - 1  # DDP exchanges once per step
            loss += (graph or learn)(x, y)
            if caught and ranks == 1:
                break
        if caught and ranks == 1:
            break  # the step is not finished; a resumed run does it again
        for one in optimizers:
            scaler.unscale_(one)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
        step_together(optimizers, scaler, norm)
        if kind == 'cpu' or ranks == 1 or step % 10 == 0:  # bool(flag) waits for a GPU
            signalled, over = map(bool, flags)  # the flags of the step before
        flags = bool(caught), 0 < max_minutes < (time.time() - began) / 60
        if ranks > 1:
            sums = torch.stack([loss, *(torch.full_like(loss, flag) for flag in flags)])
            dist.all_reduce(sums)
            loss, *flags = sums / ranks  # means; a flag's is above 0 if any rank raised it
        pending.append((loss, norm))
        state['step'] += 1
        state['tokens'] += windows_per_step * T

    # -- the end: the last save, the losses of the whole splits, the file to deploy, the report --------------
    collect()
    try_to_write('log.csv', write_rows)
    keep_checkpoint()
    if ranks > 1:
        dist.barrier()  # torchrun ends all ranks when one leaves with an error, so the save comes first
        dist.destroy_process_group()
    on_signals(end)  # a signal now ends the process at once: all is saved
    if signalled or caught:
        number = signal.Signals(caught[0] if caught else signal.SIGTERM)
        saved = 'not saved' if not out_dir or 'ckpt.pt' in unsaved else 'saved; go on with --init_from=resume'
        print(f'\n{number.name} at step {step:,}: {saved}', file=errors)
        sys.exit(128 + number)
    if not master:
        sys.exit()
    stop, speed = stop or f'{max_minutes} minutes over', state['tokens'] / max(state['seconds'], 1e-9)
    print(f"\n{stop}: {state['step']:,} steps in {duration(state['seconds'])}, {speed:,.0f} tokens/s; "
          f'{duration(time.time() - COMMAND_BEGAN)} since the command')
    passed = ', under '.join(f'{float(mark):g} is {at:,}' for mark, at in state['passed'].items())
    print(f"loss        {state['first_loss']:.4f} at first, {mean:.4f} at last, {state['best_loss']:.4f} at "
          f"best; first step under {passed or '7: none'}")
    best, at = state['best_val'], state['best_val_step']
    kept = out_dir and state['best_kept'] and os.path.exists(files['best.pt'])
    if best < math.inf:
        where = f", kept in {files['best.pt']}" if kept else ''
        print(f'best        {best:.4f} validation, {best * bits:.3f} bits per byte, at step {at:,}{where}')
    if patience and kept:  # model.pt gets the best weights
        raw_model.load_state_dict(load(files['best.pt'])[0].state_dict())
    final, context = {}, raw_model.trained_context
    splits = {'train': train_tokens} if val is train else {'validation': val_tokens, 'train': train_tokens}
    for name, tokens in splits.items():
        with autocast():
            final[name] = split_loss(raw_model, tokens, context, final_eval_tokens, f'{name} loss')
        count = min(final_eval_tokens or len(tokens), len(tokens))
        per_byte = final[name] * bits_per_nat(tokens[:count], tok)
        final.setdefault('bits per byte', per_byte)  # of the first split
        print(f'{name:11s} {final[name]:.4f}, {per_byte:.3f} bits per byte, over {count:,} of '
              f'{len(tokens):,} tokens, {context} at a time')
    keep('model.pt', losses=final)
    if sample_interval:
        print_sample(raw_model, tok, seed)
    if unsaved:
        fail(f"{', '.join(sorted(unsaved))} could not be written to {out_dir}; retry with --init_from=auto")
    if out_dir:
        print(f"{files['log.csv']} has the curve. Now: python sample.py --checkpoint={shlex.quote(out_dir)}")
