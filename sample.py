"""
Text from a trained model, on stdout as it comes; everything else goes to stderr.

$ python sample.py --start="Hello"                                 # the model in out/, else the newest run under it
$ python sample.py --checkpoint=out/quickstart --num_samples=3 --max_new_tokens=500 --temperature=0.8
$ python sample.py --start=FILE:prompt.txt --temperature=0         # greedy
"""
import codecs
import signal
import sys
import time

import torch

from config import configure, fail
from model import load, pick_device
from prepare import get_tokenizer, read_text

checkpoint = 'out'    # a model file, or a folder: its model.pt or ckpt.pt, else the newest run's below it
start = ''            # the prompt, or FILE:path to read it; <|endoftext|> in it is the token; empty starts a document
num_samples = 1       # texts
max_new_tokens = 200  # tokens a text, unless it ends itself
temperature = 1.0     # under 1 more predictable, 0 greedy (always the likeliest token)
top_k = 50            # choose among the k likeliest tokens; 0 = all
context = 0           # tokens that the model looks back; 0 = as many as it was trained with
seed = 1337           # text i draws from seed + i
device = 'auto'       # auto, cpu, cuda, cuda:1, mps
configure(globals(), dict(device=pick_device, num_samples=(1,), max_new_tokens=(1,), temperature=(0, 1e9), top_k=(0,), context=(0,),
                          seed=(0, 2**63 - 1)))

device = pick_device(device)
if hasattr(signal, 'SIGPIPE'):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends us quietly
sys.stdout.reconfigure(encoding='utf-8', errors='surrogateescape')  # a prompt may hold any bytes
model, meta = load(checkpoint, device)
print(f"{meta['path']}: {model.num_params():,} parameters, step {meta['step']:,}", file=sys.stderr)
tokenizer = get_tokenizer(meta['tokenizer'])
if tokenizer.vocab_size != model.config.vocab_size:
    fail(f"{meta['path']}: {model.config.vocab_size:,} ids, and its tokenizer has {tokenizer.vocab_size:,}")
if context > model.config.block_size:
    fail(f'--context={context}: the model has {model.config.block_size} positions', 2)
if start.startswith('FILE:'):
    start = ''.join(read_text(start[5:]))
ids = tokenizer.encode(start, special_tokens=True) or [tokenizer.start]
window = context or model.trained_context
if len(ids) > window:
    print(f'the prompt has {len(ids):,} tokens and the model looks back {window:,}: it sees the end', file=sys.stderr)
stop_ids = () if tokenizer.eot is None else (tokenizer.eot,)

tokens, began = 0, time.perf_counter()
for i in range(num_samples):
    if i:
        print('\n---------------')
    print(start, end='', flush=True)
    decoder = codecs.getincrementaldecoder('utf-8')('replace')  # characters can straddle tokens
    for step in model.generate(torch.tensor([ids]), max_new_tokens, temperature, top_k, seed + i, context, stop_ids):
        tokens += 1
        if step.item() not in stop_ids:
            print(decoder.decode(tokenizer.decode_bytes(step.tolist())), end='', flush=True)
    print(decoder.decode(b'', final=True))
seconds = time.perf_counter() - began
print(f'{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s', file=sys.stderr)
