"""
What one deploys, from a trained model: one small file, beside it, that sample.py and app.py take as it is.

$ python quantize.py                      # out/model.pt -> out/model_int8.pt: GPT-2 small 498 -> 126 MB, the loss the same
$ python quantize.py --dtype=int4         # -> out/model_int4.pt: 71 MB, the loss 0.1% higher
$ python quantize.py --dtype=bfloat16     # the weights alone, in 16 bits; with --sidecars config.json and meta.json beside it
$ python quantize.py --format=hf          # -> out/hf/, for transformers, llama.cpp and CTranslate2; float32, or --dtype=bfloat16
$ python quantize.py --checkpoint=out/quickstart
"""
import dataclasses
import glob
import json
import os
import re
import shlex
import sys
import time

import torch

from model import HAS_SAFETENSORS, Int4Linear, build, find, keep_freed_memory, load, progress, read, replacing, split_loss, write_atomically
from prepare import get_tokenizer, load_data


def to_int8(w):
    """int8 q (O, C) and float16 scale (O,) of floats w (O, C): w ≈ q * scale, the greatest of a row at ±127."""
    scale = (w.abs().amax(dim=1) / 127).clamp(min=2**-24).half()  # 2**-24: float16's least
    return (w / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8), scale


def to_int4(w, group=Int4Linear.GROUP, candidates=16):
    """uint8 pairs (O, C / 2) and bfloat16 scale (O, groups) of floats w (O, C): w ≈ (q - 8) * scale, 0 ≤ q < 16.

    Each group takes the scale of the least squared error: of candidates that put its greatest value at -7 to -11, where
    -8 is the end (beyond, it is clipped, and the many small ones are finer), each mended to the best for the q it gives.
    """
    w = torch.nn.functional.pad(w, (0, -w.size(1) % group)).unflatten(1, (-1, group))  # (O, groups, group)
    greatest = w.gather(2, w.abs().argmax(dim=2, keepdim=True))
    best = torch.full_like(greatest, torch.inf)
    scale = torch.zeros_like(greatest)
    for i in range(candidates):
        start = greatest / -(7 + i * 4 / candidates)
        q = (w / torch.where(start == 0, 1, start)).round_().clamp_(-8, 7)
        mended = ((w * q).sum(2, keepdim=True) / (q * q).sum(2, keepdim=True).clamp_(min=1)).bfloat16().float()
        error = (w - q * mended).square_().sum(2, keepdim=True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, mended, scale)
    q = (w / torch.where(scale == 0, 1, scale)).round_().clamp_(-8, 7).add_(8).flatten(1).to(torch.uint8)
    return q[:, ::2] | q[:, 1::2] << 4, scale[..., 0].bfloat16()


def convert(weights, dtype):
    """Replace a model's weights, a dict, by those of another type, one at a time, so that memory holds little of both.

    Raises ValueError for a weight that is not finite, or not once it is in 16 bits.
    """
    for name in list(weights):
        w = weights.pop(name)
        new = name.replace('weight', 'scale')
        if not w.isfinite().all():
            raise ValueError(f'{name} has weights that are not finite: the training had blown up; take an earlier model')
        if dtype.startswith('int') and w.dim() == 2 and name != 'wpe.weight':
            parts = [(to_int8 if dtype == 'int8' else to_int4)(part.float()) for part in w.split(4096)]
            weights[name], weights[new] = map(torch.cat, zip(*parts))
        else:
            new = name
            weights[name] = w.to(torch.float16 if dtype.startswith('int') else getattr(torch, dtype)).clone()
        if not weights[new].isfinite().all():
            raise ValueError(f'{name} has weights of up to {w.abs().max():.3g}, too large for {dtype}; take --dtype=bfloat16')


def size(path):
    """Bytes of a model's file, or of its shards."""
    start, sharded, _ = path.partition('.index.json')
    return sum(map(os.path.getsize, glob.glob(glob.escape(start).replace('.', '-*.')))) if sharded else os.path.getsize(path)


def measure(model, name, tokens, eval_tokens, start):
    """The loss over tokens (None: unknown), and tokens/s of one text and of eight."""
    loss = None if tokens is None else split_loss(model, tokens, model.trained_context, eval_tokens, progress(f'loss in {name}'))
    speeds = []
    for texts in (1, 8):
        for steps in (8, 8, min(64, model.trained_context)):  # the first two are for warming up
            began = time.perf_counter()
            for _ in model.generate(torch.tensor([[start]]), steps, num_samples=texts):
                pass
            seconds = time.perf_counter() - began
        speeds.append(texts * steps / seconds)
    return loss, *speeds


# Hugging Face's format ------------------------------------------------------------------------------------------------

def write_hugging_face(folder, config, weights, dtype, facts):
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load, of a model's weights, a dict.

    The config.json, without which a folder is no model, comes last; an old one, and what else an older model left, goes
    first. `facts` are what a model file says beside the weights; they stand in config.json under 'folio', so that nothing
    is lost on the way back.
    """
    from safetensors.torch import save as to_bytes
    tokenizer = get_tokenizer(facts['tokenizer'])
    tensors = {}
    for name, w in weights.items():
        transposed = re.search(r'c_\w+\.weight', name)  # their Conv1D is (inputs, outputs)
        tensors[f'transformer.{name}'] = w.t().contiguous() if transposed else w
        if name.endswith('weight') and not config['bias'] and not name.startswith('w'):  # theirs always has biases
            tensors[f'transformer.{name.removesuffix("weight")}bias'] = w.new_zeros(len(w))
    ends = dict(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)
    theirs = dict(architectures=['GPT2LMHeadModel'], model_type='gpt2', activation_function='gelu_new', layer_norm_epsilon=1e-5,
                  vocab_size=config['vocab_size'], n_positions=config['block_size'], n_ctx=config['block_size'], n_embd=config['n_embd'],
                  n_layer=config['n_layer'], n_head=config['n_head'], n_inner=None, initializer_range=0.02,
                  **{f'{part}_pdrop': config['dropout'] for part in ('attn', 'embd', 'resid')},
                  tie_word_embeddings=True, use_cache=True, dtype=dtype, torch_dtype=dtype, **ends, folio={**facts, 'config': config})
    files = {'model.safetensors': to_bytes(tensors, metadata={'format': 'pt'}), 'README.md': model_card(config, facts),
             'generation_config.json': dict(ends, pad_token_id=tokenizer.eot), **tokenizer_files(tokenizer, facts['trained_context']),
             'config.json': theirs}
    os.makedirs(folder, exist_ok=True)
    for pattern in ('config.json', 'model*.safetensors*', 'pytorch_model*.bin*', 'vocab.json', 'merges.txt'):
        for old in glob.glob(os.path.join(glob.escape(folder), pattern)):
            if pattern == 'config.json' or os.path.basename(old) not in files:
                os.remove(old)
    for name, content in files.items():
        if isinstance(content, dict):
            content = json.dumps(content, indent=1)
        with replacing(os.path.join(folder, name)) as f:
            f.write(content if isinstance(content, bytes) else content.encode())


def tokenizer_files(tokenizer, context):
    """{file: content} of a tokenizer in Hugging Face's form; a char vocabulary is byte pairs without any merges there."""
    if tokenizer.eot is None:
        vocab, merges, splitting, added = {c: i for i, c in enumerate(tokenizer.characters)}, [], None, []
        config, decoder, files = {'tokenizer_class': 'PreTrainedTokenizerFast'}, {'type': 'Fuse'}, {}
    else:
        vocab, merges = byte_pairs(tokenizer.encoding._mergeable_ranks)
        splitting = decoder = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
        added = [dict(id=tokenizer.eot, content='<|endoftext|>', single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)]
        vocab['<|endoftext|>'] = tokenizer.eot
        config = {'tokenizer_class': 'GPT2Tokenizer', 'add_prefix_space': False, **dict.fromkeys(('bos_token', 'eos_token', 'unk_token'), '<|endoftext|>')}
        files = {'vocab.json': json.dumps(vocab, ensure_ascii=False), 'merges.txt': '\n'.join(['#version: 0.2', *merges, ''])}
    model = dict(type='BPE', dropout=None, unk_token=None, continuing_subword_prefix='', end_of_word_suffix='', fuse_unk=False,
                 byte_fallback=False, vocab=vocab, merges=merges)
    files['tokenizer.json'] = dict(version='1.0', truncation=None, padding=None, added_tokens=added, normalizer=None,
                                   pre_tokenizer=splitting, post_processor=None, decoder=decoder, model=model)
    files['tokenizer_config.json'] = dict(config, model_max_length=context, clean_up_tokenization_spaces=False)
    return files


def byte_pairs(ranks):
    """GPT-2's vocabulary, {text: id}, and merges, ['left right', …], of tiktoken's {bytes: rank}; each byte as a printable
    character, as in OpenAI's encoder.py.

    tiktoken does not keep the merges: a token's is the pair that is left of it when the earlier ones have been made.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        characters.setdefault(byte, chr(256 + len(characters) - len(printable)))
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            _, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(' '.join(''.join(map(characters.get, part)) for part in parts))
    return {''.join(map(characters.get, token)): rank for token, rank in ranks.items()}, merges


def model_card(config, facts):
    """The README.md of a model on the Hub."""
    losses = ', '.join(f'{name.removesuffix("_loss")} {loss:.4f}' for name, loss in facts.get('losses', {}).items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, folio]
---

# A GPT-2 trained with folio

| | |
|---|---|
| shape | {config['n_layer']} layers, {config['n_head']} heads, {config['n_embd']} wide, {config['vocab_size']:,} tokens ({facts['tokenizer']['name']}) |
| trained context | {facts['trained_context']:,} tokens: positions past it were never trained |
| data | {facts.get('dataset') or 'unknown'} |
| steps | {facts['step']:,} |
| loss | {losses or 'unknown'} |
| made by | `{facts['made_by']}` |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained('.'), AutoTokenizer.from_pretrained('.')
ids = tokenizer('Hello', return_tensors='pt').input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50, do_sample=True, top_k=50)[0]))
```
"""


if __name__ == '__main__':
    from config import configure, fail, given
    checkpoint = 'out'        # a model file, or a folder: its model.pt or ckpt.pt, else the newest run's below it
    dtype = 'int8'            # int8, int4, bfloat16 or float32
    format = 'folio'          # folio, or hf: Hugging Face's, a folder, in float32 (which --dtype is then) or bfloat16
    max_loss_increase = 0.05  # write nothing where the loss rises by more than this share of it
    dataset = ''              # the losses are over data/<dataset>/; empty = what the model was trained on
    eval_tokens = 0           # tokens of the split in the losses, at least 2; 0 = all
    sidecars = False          # config.json (the shape) and meta.json (tokenizer, step, losses, how made) beside the file
    configure(globals(), dict(dtype=('int8', 'int4', 'bfloat16', 'float32'), format=('folio', 'hf'), max_loss_increase=(0, 1e9), eval_tokens=(0,)))
    if eval_tokens == 1:
        fail('--eval_tokens=1: a loss needs at least 2 tokens; 0 takes all', 2)

    if format == 'hf' and 'dtype' not in given:
        dtype = 'float32'
    if format == 'hf' and dtype.startswith('int'):
        fail(f"--dtype={dtype}: Hugging Face's format has none that transformers reads; take float32 or bfloat16, or leave --format away", 2)
    if format == 'hf' and not HAS_SAFETENSORS:
        fail('--format=hf wants the safetensors package: pip install safetensors')

    keep_freed_memory()
    path = find(checkpoint)
    print(path, file=sys.stderr)
    if sidecars and (format == 'hf' or not path.endswith('.pt')):
        fail("--sidecars: its config.json would stand where Hugging Face's does; leave it away, or copy the model to another folder", 2)
    source = read(path, check=False)  # of a .pt file, without bringing the tensors into memory
    if source['config'].get('quantized'):
        fail(f"{path}: {source['config']['quantized']} already; name the model that it was made from")
    folder, file = os.path.split(path)
    if not os.path.exists(checkpoint):  # from the Hub, whose cache is not ours
        folder = os.path.join('out', os.path.basename(checkpoint))
        os.makedirs(folder, exist_ok=True)
    stem = os.path.splitext(file)[0] if file.endswith('.pt') and file != 'ckpt.pt' else 'model'
    target = os.path.join(folder, 'hf' if format == 'hf' else f'{stem}_{dtype}.pt')
    if not os.access(folder or '.', os.W_OK):
        fail(f'{folder}: may not be written to; copy {path} to another folder and name that with --checkpoint')
    tokenizer = get_tokenizer(source['tokenizer'])
    source['tokenizer'] = tokenizer.meta  # of nanoGPT's with the characters, which its file lacks
    tokens, split = None, ''
    dataset = dataset or source.get('dataset', '')
    if dataset and os.path.exists(f'data/{dataset}/train.bin'):
        train, val, data_meta = load_data(dataset)
        if data_meta['tokenizer'] == source['tokenizer']:
            split = 'train' if val is None or len(val) < 2 else 'validation'
            tokens = train if split == 'train' else val
    if tokens is None and 'dataset' in given:
        fail(f'--dataset={dataset}: no data/{dataset}/train.bin in the tokenizer of {path}; leave it away to go without a loss', 2)
    if tokens is None:
        print(f"data/{dataset or '?'} is not there, or in another tokenizer, so the loss is not looked at; --dataset names another", file=sys.stderr)

    facts = {key: source[key] for key in ('format_version', 'tokenizer', 'trained_context', 'step', 'losses', 'dataset') if key in source}
    facts.update(kind='model', made_by=' '.join(['quantize.py', *sys.argv[1:], 'from', str(source.get('made_by', path))]))
    name = str(next(iter(source['model'].values())).dtype).removeprefix('torch.')
    source = None
    model, _ = load(path)  # the first load in a process pays for imports; the second is timed
    del model
    began = time.perf_counter()
    model, _ = load(path)
    sizes, loads = [size(path)], [time.perf_counter() - began]
    before = model.config
    first = measure(model, name, tokens, eval_tokens, tokenizer.start)

    began = time.perf_counter()
    weights = dict(model.state_dict())
    del model
    weights['wte.weight'] = weights['wte.weight'][:before.vocab_size]
    convert(weights, dtype)
    converting = time.perf_counter() - began
    shape = {**dataclasses.asdict(before), 'quantized': dtype if dtype.startswith('int') else ''}
    second = measure(build({**facts, 'config': shape, 'model': dict(weights)}), dtype, tokens, eval_tokens, tokenizer.start)
    if tokens is not None and not second[0] <= first[0] * (1 + max_loss_increase):
        fail(f'{dtype} raises the loss from {first[0]:.4f} to {second[0]:.4f}, more than --max_loss_increase={max_loss_increase}; '
             f'nothing is written. Take --dtype={"int8" if dtype == "int4" else "bfloat16"}, or allow more')
    began = time.perf_counter()
    if format == 'hf':
        write_hugging_face(target, shape, weights, dtype, facts)
    else:
        write_atomically(target, {**facts, 'config': shape, 'model': weights})
    converting += time.perf_counter() - began
    if sidecars:
        for file, content in (('config.json', shape), ('meta.json', {**facts, 'dtype': dtype})):
            with replacing(os.path.join(folder, file)) as f:
                f.write(json.dumps(content, indent=1).encode())
    began = time.perf_counter()
    load(target)
    sizes.append(size(find(target)))
    loads.append(time.perf_counter() - began)

    print(f"{'':20s}{name:>12s}{dtype:>12s}")
    print(f"{'size, MB':20s}{sizes[0] / 1e6:12.1f}{sizes[1] / 1e6:12.1f}")
    if tokens is not None:
        print(f"{'loss':20s}{first[0]:12.4f}{second[0]:12.4f}  {second[0] / first[0] - 1:+.2%}   (data/{dataset}, {split})")
    for i, row in ((1, 'tokens/s, one text'), (2, 'tokens/s, eight')):
        print(f'{row:20s}{first[i]:12.1f}{second[i]:12.1f}')
    print(f"{'load, s':20s}{loads[0]:12.2f}{loads[1]:12.2f}")
    print(f'{path} -> {target}, converted in {converting:.1f} s. Now: python sample.py --checkpoint={shlex.quote(target)}')
    if format == 'hf' and tokenizer.eot is None:
        print('Its tokenizer is of single characters: transformers leaves out those that it does not know, and llama.cpp has no such kind')
