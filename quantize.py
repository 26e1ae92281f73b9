"""
What one deploys, from a trained model: one small file, beside it, that sample.py and app.py take as it is.

$ python quantize.py                      # out/model.pt -> out/model_int8.pt: GPT-2 small 498 -> 125 MB, the loss the same
$ python quantize.py --dtype=int4         # -> out/model_int4.pt: 74 MB
$ python quantize.py --dtype=bfloat16     # the weights alone, in 16 bits; with --sidecars config.json and meta.json beside it
$ python quantize.py --checkpoint=out/quickstart
"""
import dataclasses
import json
import os
import sys
import time

import torch

from config import configure, fail
from model import Int4Linear, build, find, keep_freed_memory, load, read, split_loss, write_atomically
from prepare import get_tokenizer, load_data

checkpoint = 'out'         # a model file, or a folder: its model.pt or ckpt.pt, else the newest run's below it
dtype = 'int8'             # int8, int4, bfloat16 or float32
max_loss_increase = 0.05   # write nothing where the loss rises by more than this share of it
dataset = ''               # the losses are over data/<dataset>/; empty = what the model was trained on
eval_tokens = 0            # tokens of the split in the losses; 0 = all
sidecars = False           # config.json (the shape) and meta.json (tokenizer, step, losses, how made) beside the file
configure(globals(), dict(dtype=('int8', 'int4', 'bfloat16', 'float32'), max_loss_increase=(0, 1e9), eval_tokens=(0,)))


def to_int8(w):
    """int8 q (O, C) and float16 scale (O,) of floats w (O, C): w ≈ q * scale, the greatest of a row at ±127."""
    scale = (w.abs().amax(dim=1) / 127).clamp(min=2**-24).half()  # 2**-24: float16's least
    return (w / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8), scale


def to_int4(w, group=Int4Linear.GROUP, candidates=16):
    """uint8 pairs (O, C / 2) and float16 scale (O, groups) of floats w (O, C): w ≈ (q - 8) * scale, 0 ≤ q < 16.

    Each group takes the scale of the least squared error: of candidates that put its greatest value at -8, or beyond
    (clipping it, so that the many small ones are finer), each mended to the best scale for the q that it gives.
    """
    w = torch.nn.functional.pad(w, (0, -w.size(1) % group)).unflatten(1, (-1, group))  # (O, groups, group)
    greatest = w.gather(2, w.abs().argmax(dim=2, keepdim=True))
    best = torch.full_like(greatest, torch.inf)
    scale = torch.zeros_like(greatest)
    for i in range(candidates):
        start = greatest / -(7 + i * 4 / candidates)  # the greatest at -7 … -11, where -8 is the end
        q = (w / torch.where(start == 0, 1, start)).round_().clamp_(-8, 7)
        mended = ((w * q).sum(2, keepdim=True) / (q * q).sum(2, keepdim=True).clamp_(min=1)).half().float()
        error = (w - q * mended).square_().sum(2, keepdim=True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, mended, scale)
    q = (w / torch.where(scale == 0, 1, scale)).round_().clamp_(-8, 7).add_(8).flatten(1).to(torch.uint8)
    return q[:, ::2] | q[:, 1::2] << 4, scale[..., 0].half()


def convert(weights, dtype):
    """Replace a model's weights, a dict, by those of another type, one at a time, so that memory holds little of both."""
    for name in list(weights):
        w = weights.pop(name)
        if dtype.startswith('int') and w.dim() == 2 and name != 'wpe.weight':
            parts = [(to_int8 if dtype == 'int8' else to_int4)(part.float()) for part in w.split(4096)]
            weights[name], weights[name.replace('weight', 'scale')] = map(torch.cat, zip(*parts))
        else:
            weights[name] = w.to(torch.float16 if dtype.startswith('int') else getattr(torch, dtype)).clone()


def progress(done, total):
    if sys.stderr.isatty():
        print(f'\r{done / total:4.0%} of {total:,} tokens', end='' if done < total else '\r' + ' ' * 40 + '\r', file=sys.stderr, flush=True)


def measure(model, tokens, start):
    """The loss over tokens (None: unknown), and tokens/s of one text and of eight."""
    loss = None if tokens is None else split_loss(model, tokens, model.trained_context, eval_tokens, progress)
    speeds = []
    for texts in (1, 8):
        for steps in (2, min(64, model.trained_context)):  # the first is for warming up
            began = time.perf_counter()
            for _ in model.generate(torch.tensor([[start]]), steps, num_samples=texts):
                pass
            seconds = time.perf_counter() - began
        speeds.append(texts * steps / seconds)
    return loss, *speeds


keep_freed_memory()
path = find(checkpoint)
contents = read(path, check=False)
if contents['config'].get('quantized'):
    fail(f"{path}: {contents['config']['quantized']} already; name the model that it was made from")
target = os.path.join(os.path.dirname(path), f'model_{dtype}.pt')
tokenizer = get_tokenizer(contents['tokenizer'])
tokens, source = None, 'unknown: no data'
dataset = dataset or contents.get('dataset', '')
if dataset and os.path.exists(f'data/{dataset}/train.bin'):
    train, val, data_meta = load_data(dataset)
    if data_meta['tokenizer'] != contents['tokenizer']:
        fail(f'data/{dataset} is in another tokenizer than {path}; name its own --dataset')
    tokens = train if val is None or len(val) < 2 else val
    source = f"data/{dataset}, {'train' if tokens is train else 'validation'}"
else:
    print(f"data/{dataset or '?'} is not there, so the loss is not looked at; prepare.py makes it, --dataset names another", file=sys.stderr)

facts = {key: contents[key] for key in ('format_version', 'tokenizer', 'trained_context', 'step', 'losses', 'dataset') if key in contents}
facts.update(kind='model', made_by=' '.join(['quantize.py', *sys.argv[1:], 'from', str(contents.get('made_by', path))]))
began = time.perf_counter()
model, _ = load(path)
rows = [('size', os.path.getsize(path)), ('load', time.perf_counter() - began)]
before, name = model.config, f"{next(iter(contents['model'].values())).dtype}"[6:]
weights = contents = None
first = measure(model, tokens, tokenizer.start)

began = time.perf_counter()
weights = dict(model.state_dict())
del model
weights['wte.weight'] = weights['wte.weight'][:before.vocab_size]
convert(weights, dtype)
converting = time.perf_counter() - began
shape = {**dataclasses.asdict(before), 'quantized': dtype if dtype.startswith('int') else ''}
second = measure(build({**facts, 'config': shape, 'model': dict(weights)}), tokens, tokenizer.start)
if tokens is not None and not second[0] <= first[0] * (1 + max_loss_increase):
    fail(f'{dtype} raises the loss from {first[0]:.4f} to {second[0]:.4f}, more than --max_loss_increase={max_loss_increase}; '
         f'nothing is written. Take --dtype={"int8" if dtype == "int4" else "bfloat16"}, or allow more')
began = time.perf_counter()
write_atomically(target, {**facts, 'config': shape, 'model': weights})
converting += time.perf_counter() - began
if sidecars:
    for file, content in (('config.json', shape), ('meta.json', {**facts, 'dtype': dtype})):
        with open(os.path.join(os.path.dirname(path), file), 'w', encoding='utf-8') as f:
            json.dump(content, f, indent=1)
began = time.perf_counter()
load(target)
loading = time.perf_counter() - began

change = '' if tokens is None else f'  {second[0] / first[0] - 1:+.2%}'
print(f'''{'':24s}{name:>12s}{dtype:>12s}
{'size, MB':24s}{rows[0][1] / 1e6:12.1f}{os.path.getsize(target) / 1e6:12.1f}''')
if tokens is not None:
    print(f"{'loss':24s}{first[0]:12.4f}{second[0]:12.4f}{change}   ({source})")
print(f'''{'tokens/s, one text':24s}{first[1]:12.1f}{second[1]:12.1f}
{'tokens/s, eight':24s}{first[2]:12.1f}{second[2]:12.1f}
{'load, s':24s}{rows[1][1]:12.2f}{loading:12.2f}
{path} -> {target}, converted in {converting:.1f} s. Now: python sample.py --checkpoint={target}''')
