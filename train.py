"""
Train a GPT-2: from scratch, from where a run stopped, or from another model's weights.

$ python train.py config/quickstart.py                     # characters, 0.6M parameters: 10 s on two CPU cores, loss 1.65
$ python train.py config/shakespeare.py --batch_size=32    # GPT-2 small (124M) on input.txt, until its loss is under 0.1
$ python train.py config/shakespeare.py --init_from=resume # goes on where Ctrl-C, a kill or a power cut stopped it
$ python train.py --input=my.txt --dataset=mine --out_dir=out/mine --seq_len=256 --max_iters=2000
$ python train.py config/finetune.py --init_from=gpt2      # from OpenAI's weights; a Hugging Face folder, a nanoGPT checkpoint, …
$ python train.py config/bench.py                          # tokens/s, MFU and memory of this machine, in under a minute
$ torchrun --nproc_per_node=8 train.py config/shakespeare.py --init_from=auto --batch_size=64   # data parallel
"""
import datetime
import functools
import math
import os
import shlex
import signal
import socket
import sys
import threading
import time

import numpy as np
import torch
import torch.distributed as dist

from config import configure, fail, given
from model import (GPT, GPTConfig, Muon, device_name, duration, keep_freed_memory, load, peak_flops, peak_memory, pick_device,
                   pick_dtype, progress, read, recited, save, split_loss)
from prepare import check_dataset, find_files, get_tokenizer, load_data, prepare, sha256_of

# run
out_dir = 'out'                  # folder of checkpoints, model and log; empty = write nothing
init_from = 'scratch'            # scratch, resume, gpt2 … gpt2-xl, a path or Hub id; auto, auto:gpt2 … (resume what is there, else start)
overwrite = False                # start over where a run already is
# data
input = 'input.txt'              # UTF-8 text, prepared when data/<dataset>/ is not there: a file, a folder or a glob
dataset = 'shakespeare'          # tokens come from data/<dataset>/
tokenizer = 'gpt2'               # gpt2 or char
val_fraction = 0.1               # share of the text kept for validation; 0 = none
# model
n_layer = 12                     # blocks
n_head = 12                      # attention heads a block
n_embd = 768                     # width, a multiple of n_head
block_size = 1024                # positions that the model has, tokens
dropout = 0.0                    # share of activations dropped; helps where a small text is read many times
bias = True                      # biases in linear layers and norms, as GPT-2; False is a little faster
# batch
batch_size = 8                   # windows a forward pass; more is faster a token until memory is full
seq_len = 0                      # tokens a window; 0 = block_size
gradient_accumulation_steps = 1  # forward passes a step: a larger batch in the same memory
shift_windows = True             # draw each epoch's first cut; generalises better, False keeps the windows fixed
# optimizer
optimizer = 'adamw'              # adamw, or muon for the blocks' matrices (twice the progress a step) and adamw for the rest
learning_rate = 6e-4             # the highest
min_lr = 6e-5                    # where cosine and linear end
schedule = 'cosine'              # cosine, onecycle (as torch's OneCycleLR; sets beta1 too), linear or constant
warmup_iters = 100               # steps of linear warm-up: (i + 1) / warmup_iters of the rate at step i from 0
lr_decay_iters = 0               # step at which the schedule ends; 0 = max_iters
weight_decay = 0.1               # of matrices, not of biases and norms
beta1 = 0.9                      # AdamW's memory of the gradient
beta2 = 0.95                     # AdamW's memory of its square; nearer 1 for small batches
grad_clip = 1.0                  # greatest gradient norm; 0 = no clipping
# stopping
max_iters = 5000                 # steps
loss_threshold = 0.0             # stop when the mean training loss of the last epoch (at most 100 steps) is under it; 0 = never
patience = 0                     # stop after so many evaluations without a better validation loss; 0 = never
max_minutes = 0.0                # stop, ready to resume, after so long; 0 = never
# rhythm, in steps; 0 = never
log_interval = 10                # a line here and in out_dir/log.csv
eval_interval = 250              # validation, and out_dir/best.pt where it is the best so far
eval_iters = 20                  # batches an evaluation of a split
checkpoint_interval = 500        # the whole state to out_dir/ckpt.pt
sample_interval = 500            # print what the model writes by now
final_eval_tokens = 0            # tokens of each split in the losses at the end; 0 = all
# system
device = 'auto'                  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'                   # auto (bfloat16 where the chip multiplies it, else float32), float32, bfloat16, float16
compile = 'auto'                 # auto (on CUDA), True or False: a minute of compiling for faster steps
gradient_checkpointing = False   # run each block's forward again in backward: a third slower, much less memory
deterministic = False            # repeat bit for bit on CUDA too, somewhat slower
seed = 1337                      # of weights, order of windows, dropout

settings = configure(globals(), dict(
    dataset=check_dataset, device=pick_device, val_fraction=(0, 0.999999), tokenizer=('gpt2', 'char'), n_layer=(1,), n_head=(1,), n_embd=(1,), block_size=(1,),
    dropout=(0, 0.999999), batch_size=(1, 2**16), seq_len=(0,), gradient_accumulation_steps=(1, 2**16), optimizer=('adamw', 'muon'),
    learning_rate=(0, 1e3), min_lr=(0, 1e3), schedule=('cosine', 'onecycle', 'linear', 'constant'), warmup_iters=(0,),
    lr_decay_iters=(0,), weight_decay=(0, 1e3), beta1=(0, 0.999999), beta2=(0, 0.99999999), grad_clip=(0, 1e9),
    max_iters=(0,), loss_threshold=(0, 1e9), patience=(0,), max_minutes=(0, 1e9), log_interval=(0,), eval_interval=(0,),
    eval_iters=(1,), checkpoint_interval=(0,), sample_interval=(0,), final_eval_tokens=(0,),
    dtype=('auto', 'float32', 'bfloat16', 'float16'), compile=('auto', 'True', 'False'), seed=(0, 2**32)),
    'lower --batch_size and raise --gradient_accumulation_steps as much, or lower --seq_len, or give --gradient_checkpointing')
if patience and not eval_interval:
    fail('--patience counts evaluations, and --eval_interval=0 has none; give an --eval_interval', 2)

# -- ranks: torchrun starts one process a device, all with the same command ---------------------------------------------
rank, ranks = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
master = rank == 0  # the one that writes and prints
if not master:
    sys.stdout = open(os.devnull, 'w', encoding='utf-8')

# -- the run: start over, go on, or refuse -----------------------------------------------------------------------------
files = {name: os.path.join(out_dir, name) for name in ('ckpt.pt', 'best.pt', 'model.pt', 'log.csv')}
there = [path for path in files.values() if os.path.exists(path)] if out_dir else []
if init_from.split(':')[0] == 'auto':
    init_from = 'resume' if files['ckpt.pt'] in there else init_from[5:] or 'scratch'
    overwrite |= files['model.pt'] not in there  # killed before its first checkpoint: nothing to keep
checkpoint = None
if init_from == 'resume':
    if files['ckpt.pt'] not in there:
        fail(f"{files['ckpt.pt']}: nothing to resume; leave --init_from away to start a run")
    checkpoint = read(files['ckpt.pt'], kind='checkpoint')
    for key, value in checkpoint['settings'].items():  # defaults, checkpoint, config files, command line
        if key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'dataset', 'tokenizer', 'optimizer') and settings[key] != value:
            if key in given:
                fail(f'--{key}={settings[key]}: the run in {out_dir} has {value}; leave it away, or start another --out_dir', 2)
        if key not in given and key in settings and key not in ('out_dir', 'init_from', 'overwrite'):
            settings[key] = globals()[key] = value
elif there and not overwrite:
    fail(f"{', '.join(there)}: a run is already there; {'--init_from=resume goes on with it, ' if files['ckpt.pt'] in there else ''}"
         f'--overwrite replaces it, --out_dir=out/another keeps it')

device = pick_device(device)
device_type = device.split(':')[0]
if device_type == 'cuda':
    torch.cuda.set_device(device)  # before anything that opens a context, which would be on GPU 0 in every rank
keep_freed_memory()
characters = ''  # of a parent's char vocabulary
if init_from not in ('scratch', 'resume'):
    parent, parent_meta = load(init_from)
    if parent.config.quantized:
        fail(f"{parent_meta['path']}: {parent.config.quantized} weights cannot be trained; name the model that they were made from")
    if master:
        print(f"{parent_meta['path']}: {parent.num_params():,} parameters, step {parent_meta['step']:,}", file=sys.stderr)
    for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias'):
        if key in given and settings[key] != getattr(parent.config, key):
            fail(f'--{key}={settings[key]}: {init_from} has {getattr(parent.config, key)}; leave it away', 2)
        settings[key] = globals()[key] = getattr(parent.config, key)
    if 'tokenizer' not in given:
        settings['tokenizer'] = tokenizer = parent_meta['tokenizer']['name']
    try:
        characters = get_tokenizer(parent_meta['tokenizer']).meta.get('characters', '')
    except ValueError:  # nanoGPT's, whose characters may be in the data to come
        pass

accumulation, rows = gradient_accumulation_steps, batch_size  # this rank's share
if accumulation % ranks == 0:
    accumulation //= ranks
elif rows % ranks == 0:
    rows //= ranks
else:
    fail(f'{ranks} ranks cannot share batch_size {batch_size} x gradient_accumulation_steps {accumulation} evenly; '
         f'make one of them a multiple of {ranks}', 2)

# -- the data ----------------------------------------------------------------------------------------------------------
if ranks > 1:
    # torchrun keeps its store over a restart: without a prefix a rank may read where the last attempt's ranks listened
    store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), next(dist.rendezvous('env://', rank, ranks))[0])
    if not master:  # the others wait for the data
        store.wait(['data'], datetime.timedelta(days=1))
if master and not os.path.exists(f'data/{dataset}/train.bin'):
    prepare(input, dataset, tokenizer, val_fraction, characters=characters)
if ranks > 1:
    store.set('data', 'prepared')
    dist.init_process_group('nccl' if device_type == 'cuda' else 'gloo', store=store, rank=rank, world_size=ranks)
train_tokens, val_tokens, data_meta = load_data(dataset)
has, way_out = data_meta.get('source', {}), 'name another --dataset, or prepare it again with prepare.py'
if 'tokenizer' in given and tokenizer != data_meta['tokenizer']['name']:
    fail(f"data/{dataset} has tokenizer {data_meta['tokenizer']['name']}, and {tokenizer} was asked for; {way_out}", 2)
if 'val_fraction' in given and val_fraction != data_meta.get('val_fraction', val_fraction):
    fail(f"data/{dataset} has val_fraction {data_meta['val_fraction']}, and {val_fraction} was asked for; {way_out}", 2)
if 'input' in given and has and sha256_of(find_files(input)) != has['sha256']:
    fail(f"data/{dataset} was made from {has['input']}, and {input} was asked for, which differs; {way_out}", 2)
if checkpoint and checkpoint['data'] != data_meta:
    fail(f'data/{dataset} is not what the run in {out_dir} was trained on; prepare that again, or start another --out_dir')
text = get_tokenizer(data_meta['tokenizer'])

T = seq_len or block_size
if T > block_size:
    fail(f'--seq_len={seq_len}: the model has block_size {block_size} positions; lower the one or raise the other', 2)
if len(train_tokens) < T + 1:
    fail(f'data/{dataset} holds {len(train_tokens)} training tokens, fewer than seq_len {T} and the next; '
         f"give a longer --input{f', or --seq_len={len(train_tokens) - 1} or less' if len(train_tokens) > 1 else ''}")
if val_tokens is not None and len(val_tokens) < 2:
    val_tokens = None  # one token has nothing to predict it from
windows = (len(train_tokens) - 1) // T  # an epoch
windows_per_step = batch_size * gradient_accumulation_steps
epoch_steps = max(windows // windows_per_step, 1)


@functools.lru_cache(maxsize=2)
def epoch_starts(epoch):
    """First tokens of an epoch's windows, in the order that (seed, epoch) draws."""
    rng = np.random.default_rng((seed, epoch))
    starts = rng.permutation(windows) * T
    if shift_windows:
        starts += rng.integers(T)
        starts[starts + T + 1 > len(train_tokens)] = 0  # the one pushed off the end takes what the shift left at the head
    return starts


def get_batch(step, micro_step):
    """Inputs and targets (B, T) of a forward pass: a function of (seed, step) alone, however the run was cut or shared."""
    first = step * windows_per_step + (micro_step * ranks + rank) * rows
    return fetch(train_source, [epoch_starts(i // windows)[i % windows] for i in range(first, first + rows)])


def fetch(tokens, starts):
    """The windows of T tokens at `starts` and their next tokens, each (B, T), on the device."""
    starts = torch.tensor(np.array(starts))[:, None]
    if tokens.is_cuda:
        starts = starts.pin_memory().to(device, non_blocking=True)
    ids = tokens[starts + torch.arange(T + 1, device=starts.device)]  # (B, T + 1)
    if device_type == 'cuda' and not tokens.is_cuda:
        ids = ids.pin_memory()
    ids = ids.to(device, non_blocking=True).long()
    return ids[:, :-1], ids[:, 1:].contiguous()


# -- the model ---------------------------------------------------------------------------------------------------------
try:
    config = GPTConfig(block_size, data_meta['tokenizer']['vocab_size'], n_layer, n_head, n_embd, dropout, bias)
except ValueError as error:
    fail(error, 2)
compute_dtype = pick_dtype(device, dtype)
torch.manual_seed(seed)
if device_type == 'cuda':
    torch.backends.cuda.matmul.allow_tf32 = dtype != 'float32'
if deterministic:
    os.environ.update(CUBLAS_WORKSPACE_CONFIG=':4096:8', TORCHINDUCTOR_DETERMINISTIC='1')
    torch.use_deterministic_algorithms(True)
# on a GPU a corpus of up to half a billion tokens lives there, and only the windows' starts travel
train_source, val_source = (
    split if split is None else torch.from_numpy(split.astype(np.int32)).to(device)
    if device_type == 'cuda' and len(split) < 2**29 else torch.from_numpy(split) for split in (train_tokens, val_tokens))
autocast = functools.partial(torch.autocast, device_type, dtype=compute_dtype, enabled=compute_dtype != torch.float32)

made_by = 'train.py ' + ' '.join(sys.argv[1:])
if init_from in ('scratch', 'resume'):
    model = GPT(config).to(device)
    model.trained_context = T
    if checkpoint:
        model.load_state_dict(checkpoint['model'])
        model.trained_context = max(T, checkpoint['trained_context'])
else:
    model = parent.to(device)
    if get_tokenizer(parent_meta['tokenizer']).meta != data_meta['tokenizer']:
        fail(f"{init_from} reads tokenizer {parent_meta['tokenizer']['name']}, and data/{dataset} is in another; {way_out}")
    model.trained_context = max(T, model.trained_context)
    for module in model.modules():
        if hasattr(module, 'dropout'):
            module.dropout = dropout
    model.config.dropout = dropout
model.train()
model.gradient_checkpointing = gradient_checkpointing
raw_model = model  # the one to save: a compiled model prefixes its names with _orig_mod.
groups = model.param_groups(weight_decay)
optimizers = [torch.optim.AdamW(groups[1:] if optimizer == 'muon' else groups, lr=learning_rate, betas=(beta1, beta2),
                                fused=device_type in ('cuda', 'cpu'))]
if optimizer == 'muon':
    optimizers.append(Muon(groups[:1], lr=learning_rate, dtype=compute_dtype))
scaler = torch.amp.GradScaler(device_type, enabled=compute_dtype == torch.float16)
if compile == 'True' or compile == 'auto' and device_type == 'cuda':
    model = torch.compile(model, dynamic=False)
    try:
        with autocast():
            model(*get_batch(0, 0)).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        print(f"compile failed ({str(error).strip().splitlines()[0][:200]}); going on eagerly, which is slower", file=sys.stderr)
        model = raw_model
    raw_model.zero_grad(set_to_none=True)

# -- the state of the run, all of it, and how it is kept ---------------------------------------------------------------
state = dict(step=0, seconds=0.0, log_bytes=0, logged_step=0, loss_sum=0.0, loss_count=0, tokens=0, recent=[], first_loss=0.0,
             best_loss=math.inf, grad_norm=0.0, best_val=math.inf, best_val_step=0, bad_evals=0, passed={}, losses={},
             tuned=init_from not in ('scratch', 'resume'))
if checkpoint:
    state = checkpoint['state']
    for one, kept in zip(optimizers, checkpoint['optimizers']):
        decays = [group['weight_decay'] for group in one.param_groups]  # as this command has them
        one.load_state_dict(kept)
        for group, decay in zip(one.param_groups, decays):
            group['weight_decay'] = decay
    if checkpoint['scaler']:
        scaler.load_state_dict(checkpoint['scaler'])
    checkpoint = None
milestones = [m for m in (7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, loss_threshold) if m]
threshold_window = min(epoch_steps, 100)
pending = []  # (loss, gradient norm) of steps whose values are still on their way from the device
lock = threading.RLock()  # held while weights, optimizer and state change together
saved_step = -1
wish = 0  # a signal's number, in a run of several ranks, which must stop together


def rate(i):
    """Learning rate of step i from 0, and beta1."""
    last = lr_decay_iters or max_iters
    if schedule == 'onecycle':  # torch.optim.lr_scheduler.OneCycleLR with its defaults
        peak = 0.3 * last - 1
        up = i <= peak
        x = i / peak if up else min((i - peak) / (last - 1 - peak), 1.0)
        ease = (1 + math.cos(math.pi * x)) / 2  # 1 -> 0
        ends = (learning_rate / 25, learning_rate) if up else (learning_rate, learning_rate / 25 / 1e4)
        betas = (0.95, 0.85) if up else (0.85, 0.95)
        return ends[1] + (ends[0] - ends[1]) * ease, betas[1] + (betas[0] - betas[1]) * ease
    if i < warmup_iters:
        return learning_rate * (i + 1) / warmup_iters, beta1
    x = min((i - warmup_iters) / max(last - warmup_iters, 1), 1.0)
    share = {'cosine': (1 + math.cos(math.pi * x)) / 2, 'linear': 1 - x, 'constant': 1.0}[schedule]
    return (min_lr + share * (learning_rate - min_lr) if schedule != 'constant' else learning_rate), beta1


def drain():
    """Bring the pending losses from the device into the state: the only wait for the device between two log lines."""
    if not pending:
        return
    values = torch.stack([torch.stack(pair) for pair in pending]).tolist()
    first = state['step'] - len(pending) + 1
    pending.clear()
    for step, (loss, grad_norm) in enumerate(values, first):
        if not math.isfinite(loss) or not math.isfinite(grad_norm) and not scaler.is_enabled():
            if not master:
                os._exit(1)
            fail(f'loss {loss}, gradient norm {grad_norm} at step {step}: the run has blown up; {out_dir}/ckpt.pt is kept as it was. '
                 f'Lower --learning_rate={learning_rate}, raise --warmup_iters={warmup_iters}, or give --dtype=float32')
        state['first_loss'] = state['first_loss'] or loss
        state['loss_sum'] += loss
        state['loss_count'] += 1
        state['recent'] = (state['recent'] + [loss])[-threshold_window:]
        state['best_loss'] = min(state['best_loss'], loss)
        state['grad_norm'] = grad_norm
        for milestone in milestones:
            if loss < milestone:
                state['passed'].setdefault(str(milestone), step)


def save_checkpoint():
    global saved_step
    with lock:
        drain()
        state['seconds'] = last_seconds + time.time() - began
        if master and out_dir and saved_step != state['step']:
            save(files['ckpt.pt'], raw_model, data_meta['tokenizer'], kind='checkpoint', step=state['step'], dataset=dataset, made_by=made_by,
                 losses=state['losses'], settings=settings, data=data_meta, state=state, optimizers=[one.state_dict() for one in optimizers],
                 scaler=scaler.state_dict())
            saved_step = state['step']


def on_signal(receiver):
    """Wait for Ctrl-C or SIGTERM, save, end. A thread of its own: backward is one long call in which Python's own
    handlers would wait, and a save needs none of what it is computing.
    """
    global wish
    number = wish = receiver.recv(1)[0]
    if ranks > 1:  # the loop passes it on with the gradients and stops all; where a step takes longer, rank 0 saves alone
        time.sleep(1.5 if master else 25)
        if not master:
            os._exit(128 + number)
    with lock:
        try:
            save_checkpoint()
            farewell(number)
        except BaseException as error:
            print(f'train.py: {error}', file=sys.stderr)
            number = 1 - 128
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + number)


@functools.cache  # the loop and the thread may both come here
def farewell(number):
    where = f"saved in {files['ckpt.pt']}; go on with the same command and --init_from=resume" if out_dir else 'nothing kept'
    print(f"\n{signal.Signals(number).name} at step {state['step']:,}: {where}", file=sys.stderr)


def on_error(kind, error, trace, report=sys.excepthook):
    """sys.excepthook: whoever read our output is gone (`| head`), but the run need not be lost."""
    if issubclass(kind, BrokenPipeError):
        save_checkpoint()
    report(kind, error, trace)


def exchange(step_loss, over):
    """Average gradients and loss over all ranks, in place, once a step; return whether any has a signal, or time is over."""
    grads = [p.grad for p in raw_model.parameters()]
    flags = torch.stack([torch.full((), float(flag), device=device)  # torch.tensor would wait for the device
                         for flag in (wish == signal.SIGINT, wish == signal.SIGTERM, over)])
    flat = torch.cat([grad.flatten() for grad in grads] + [step_loss[None], flags])
    sum_over_ranks(flat)
    flat /= ranks
    *parts, loss, flags = flat.split([grad.numel() for grad in grads] + [1, 3])
    for grad, part in zip(grads, parts):
        grad.copy_(part.view_as(grad))
    step_loss.copy_(loss[0])
    return flags


def sum_over_ranks(tensor):
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        fail(f'rank {rank} lost the others: {str(error).splitlines()[0]}')


def leave(status):
    """End one rank of several at once: Python's way out aborts now and then ("terminate called without an active
    exception", 4 of 14 runs of four ranks with gloo), and torchrun takes the run for failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def log_row(**row):
    """Append a row to log.csv, in one write."""
    if not (master and out_dir):
        return
    columns = ['step', 'loss', 'grad_norm', 'lr', 'train_loss', 'val_loss', 'tokens_per_s', 'seconds']
    line = ','.join(row.get(column, '') for column in columns) + '\n'
    with open(files['log.csv'], 'a', encoding='utf-8', newline='\n') as f:
        if f.tell() == 0:
            line = ','.join(columns) + '\n' + line
        f.write(line)
        f.flush()
        state['log_bytes'] = f.tell()


@torch.no_grad()
def evaluate(tokens):
    """Mean loss over eval_iters batches of windows spread evenly over a split, always the same ones, shared by the ranks."""
    count = (len(tokens) - 1) // T
    with autocast():
        if count <= eval_iters * batch_size:
            return split_loss(raw_model, tokens.numpy(force=True), T)
        raw_model.eval()  # not the compiled one: it would be compiled a second time for this
        starts = np.linspace(0, count - 1, eval_iters * batch_size).astype(np.int64) * T
        parts, total = starts.reshape(-1, rows), torch.zeros((), device=device)
        for part in parts[rank::ranks]:
            total += raw_model(*fetch(tokens, part))
        raw_model.train()
        if ranks > 1:
            sum_over_ranks(total)
        return total.item() / len(parts)


def both_losses():
    train = evaluate(train_source)
    return {'train_loss': train, 'val_loss': train if val_source is None else evaluate(val_source)}


def print_sample():
    ids = torch.tensor([[text.start]])
    written = [step.item() for step in raw_model.generate(ids, 100, temperature=0.8, top_k=50, seed=seed)]
    print('  | ' + text.decode_bytes(written).decode('utf-8', 'replace').strip().replace('\n', '\n  | '))


# -- start -------------------------------------------------------------------------------------------------------------
if master and out_dir:
    os.makedirs(out_dir, exist_ok=True)
    if init_from != 'resume':
        for path in there:
            os.remove(path)
    elif os.path.exists(files['log.csv']):
        os.truncate(files['log.csv'], min(state['log_bytes'], os.path.getsize(files['log.csv'])))
began = time.time()  # on_signal may save from here on, and asks how long the run took
last_seconds, last_tokens, first_step = state['seconds'], state['tokens'], state['step']
receiver, sender = socket.socketpair()
sender.setblocking(False)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: None)  # the byte in the socket wakes on_signal at once
signal.set_wakeup_fd(sender.fileno())
threading.Thread(target=on_signal, args=(receiver,), daemon=True).start()

peak = ranks * peak_flops(device, compute_dtype)
flops = raw_model.flops_per_token(T)
print(f'{raw_model.num_params():,} parameters on {f"{ranks} x " if ranks > 1 else ""}{device_name(device)}, {str(compute_dtype)[6:]}'
      f'{", compiled" if model is not raw_model else ""}, {peak / 1e12:.3g} TFLOP/s at most')
print(f'data/{dataset}: {len(train_tokens):,} training tokens, {0 if val_tokens is None else len(val_tokens):,} for validation'
      f'{" (none: the training split stands in)" if val_tokens is None else ""}; '
      f'{batch_size} x {T} x {gradient_accumulation_steps} tokens a step, {epoch_steps:,} steps an epoch')
print(f"{out_dir or 'nothing written'}: {'step ' + format(state['step'], ',') if init_from == 'resume' else f'a new run from {init_from}'}, up to step {max_iters:,}"
      + (f', or a loss under {loss_threshold}' if loss_threshold else ''))
epochs = max_iters * windows_per_step / windows  # past four they add little to what a model knows: https://arxiv.org/abs/2305.16264
if epochs > 4 and raw_model.num_params() > 10 * len(train_tokens) and not loss_threshold:
    print(f'{len(train_tokens):,} training tokens, read {epochs:.0f} times, are few for so many parameters: they will be learnt by heart. '
          'A longer --input or fewer --max_iters helps' + ('; best.pt will be from where the validation loss is lowest' if
                                                           out_dir and eval_interval and val_tokens is not None else ''))
flags, over, foretold = None, False, False
sys.excepthook = on_error
if state.get('tuned') and not state['step'] and math.isinf(state['best_val']) and eval_interval:  # what there is to improve on
    losses = both_losses()
    print(f"before the first step: train {losses['train_loss']:.4f}, validation {losses['val_loss']:.4f}", flush=True)
    if master and out_dir:
        save(files['best.pt'], raw_model, data_meta['tokenizer'], step=0, losses=losses, dataset=dataset, made_by=made_by)
    state.update(losses=losses, best_val=losses['val_loss'])
began = last_time = time.time()

# -- the loop ----------------------------------------------------------------------------------------------------------
while True:
    step = state['step']  # steps done

    # look at what is done, once a step; a run that is saved in the middle of this looks again
    log, evaluation, checkpointing, sampling = (bool(interval) and step % interval == 0 for interval in (
        log_interval, eval_interval, checkpoint_interval, sample_interval))
    look = loss_threshold > 0 and step % 10 == 0
    last = step >= max_iters or over
    if look or log or evaluation or checkpointing or sampling or last:
        with lock:
            drain()
    looked = time.time()
    mean = sum(state['recent']) / max(len(state['recent']), 1)  # of the last epoch's steps, at most 100
    stop = (f'max_iters {max_iters:,} reached' if step >= max_iters else
            f'loss {mean:.6f} under {loss_threshold}' if look and len(state['recent']) == threshold_window and mean < loss_threshold else
            f'{max_minutes} minutes over' if over else '')
    if step > state['logged_step'] and (log or evaluation or stop and not over):  # no row that the run never stopped lacks
        losses = both_losses() if evaluation else {}
        better = bool(losses) and losses['val_loss'] < state['best_val']
        if better and master and out_dir:
            save(files['best.pt'], raw_model, data_meta['tokenizer'], step=step, losses=losses, dataset=dataset, made_by=made_by)
        with lock:
            state['seconds'] = last_seconds + time.time() - began
            loss, (lr, _) = state['loss_sum'] / state['loss_count'], rate(step - 1)
            tokens_per_s = (state['tokens'] - last_tokens) / max(looked - last_time, 1e-9)
            left = (max_iters - step) * (time.time() - began) / max(step - first_step, 1)
            print(f"step {step:,}/{max_iters:,}  loss {loss:.4f}  best {state['best_loss']:.4f}  norm {state['grad_norm']:.2f}  "
                  f'lr {lr:.2e}  {tokens_per_s:,.0f} tok/s  mfu {tokens_per_s * flops / peak:.0%}  {peak_memory(device)}  '
                  f'{duration(left)} left', flush=True)
            log_row(step=str(step), loss=f'{loss:.6f}', grad_norm=f"{state['grad_norm']:.6f}", lr=f'{lr:.6e}',
                    tokens_per_s=f'{tokens_per_s:.1f}', seconds=f"{state['seconds']:.2f}",
                    **{key: f'{value:.6f}' for key, value in losses.items()})
            state.update(loss_sum=0.0, loss_count=0, logged_step=step)
            if losses:
                print(f"  train {losses['train_loss']:.4f}, validation {losses['val_loss']:.4f}{', the best so far' if better else ''}")
                state.update(losses=losses, bad_evals=0 if better else state['bad_evals'] + 1)
                if better:
                    state.update(best_val=losses['val_loss'], best_val_step=step)
            last_time, last_tokens = looked, state['tokens']
    if 0 < patience <= state['bad_evals']:
        stop = stop or f'no better validation loss in {patience} evaluations'
    if sampling and step > first_step:
        print_sample()
    if checkpointing and step > first_step:
        save_checkpoint()
    last_time += time.time() - looked  # tokens/s is of training alone
    if stop:
        break

    # one step: forward, backward, clip, update
    lr, momentum = rate(step)
    for one in optimizers:
        for group in one.param_groups:
            group.update({'lr': lr, **({'betas': (momentum, beta2)} if 'betas' in group else {})})
    step_loss = torch.zeros((), device=device)
    for micro_step in range(accumulation):
        if dropout:
            torch.manual_seed(hash((seed, step, micro_step, rank)))  # resume draws the same
        x, y = get_batch(step, micro_step)
        with autocast():
            loss = model(x, y) / accumulation
        scaler.scale(loss).backward()
        step_loss += loss.detach()
    over = 0 < max_minutes < (time.time() - began) / 60
    if ranks > 1:
        flags = exchange(step_loss, over and master)
    for one in optimizers:
        scaler.unscale_(one)
    grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    with lock:
        for one in optimizers:
            scaler.step(one)
        scaler.update()
        raw_model.zero_grad(set_to_none=True)
        pending.append((step_loss, grad_norm))
        state['step'] += 1
        state['tokens'] += windows_per_step * T
    if flags is not None and (device_type == 'cpu' or step % 10 == 9):  # reading them waits for the device
        interrupted, terminated, over = (flags > 0).tolist()
        if interrupted or terminated:
            save_checkpoint()
            number = signal.SIGTERM if terminated else signal.SIGINT
            if master:
                farewell(number)
            dist.barrier()  # torchrun ends the others as soon as one is gone
            leave(128 + number)
    elif flags is not None:
        over = False
    taken = time.time() - began
    if device_type == 'cpu' and not foretold and (taken > 5 or step == first_step + 2):
        total, foretold = taken / (step + 1 - first_step) * (max_iters - first_step), True
        if total > 1800:
            print(f'at this rate {max_iters - first_step:,} steps take {duration(total)} on this CPU; '
                  f'python train.py config/quickstart.py shows all of it within a minute', flush=True)

# -- the end: the whole splits, the file to deploy, the report ---------------------------------------------------------
save_checkpoint()
if ranks > 1:
    dist.destroy_process_group()
if not master:
    leave(0)
final, recitals = {}, {}
for name, tokens in (('validation', val_tokens), ('train', train_tokens)):
    if tokens is not None and len(tokens) > 1:
        with autocast():
            final[name] = split_loss(raw_model, tokens, raw_model.trained_context, final_eval_tokens, progress(f'{name} loss'))
        if not final_eval_tokens and len(tokens) > 100:
            recitals[name] = recited(raw_model, tokens)
if out_dir:
    save(files['model.pt'], raw_model, data_meta['tokenizer'], step=state['step'], losses=final, dataset=dataset,
         made_by=made_by)

print(f"\n{stop}: {state['step']:,} steps in {duration(state['seconds'])}, {state['tokens'] / max(state['seconds'], 1e-9):,.0f} tokens/s")
if state['step']:
    print(f"loss        {state['first_loss']:.4f} at first, {mean:.4f} at last, {state['best_loss']:.4f} at best; first step under "
          + (', '.join(f'{float(key):g}: {value:,}' for key, value in state['passed'].items()) or 'none'))
if math.isfinite(state['best_val']):
    print(f"best        {state['best_val']:.4f} validation at step {state['best_val_step']:,}" + (f", kept in {files['best.pt']}" if out_dir else ''))
for name, loss in final.items():
    tokens = val_tokens if name == 'validation' else train_tokens
    count = min(len(tokens), final_eval_tokens or len(tokens))
    print(f'{name:11s} {loss:.4f} over {"all " if count == len(tokens) else "the first "}{count:,} tokens, in windows of {raw_model.trained_context}'
          + (f'; greedy decoding recites {recitals[name]:.0%} of its 50-token continuations' if name in recitals else ''))
if out_dir:
    best = patience and state['bad_evals']  # who gives a patience is after the validation loss
    path = files['best.pt'] if best else '' if out_dir == 'out' else out_dir
    print(f"{files['best.pt' if best else 'model.pt']} is what one deploys. Now: python sample.py{path and ' --checkpoint=' + shlex.quote(path)}")
    print(f"{files['log.csv']} has the curve, for a spreadsheet or gnuplot -p -e \"set datafile separator ','; "
          f"plot '{files['log.csv']}' using 1:2 with lines\"")
if ranks > 1:
    leave(0)
