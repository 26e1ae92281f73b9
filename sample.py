"""
Text from a trained model, on stdout as it comes; everything else goes to stderr.

$ python sample.py --start="Hello"                                 # the model in out/, else the newest run under it
$ python sample.py --checkpoint=out/quickstart --num_samples=3 --max_new_tokens=500 --temperature=0.8
$ python sample.py --start=FILE:prompt.txt --temperature=0         # greedy; --start=- reads standard input
$ python sample.py --interactive                                   # a prompt at a time
"""
import os
import signal
import sys
import time

import torch

from config import configure, fail
from model import keep_freed_memory, load, pick_device, pick_dtype
from prepare import TextStream, get_tokenizer, read_text

checkpoint = 'out'        # a model file, or a folder: its model.pt or ckpt.pt, else the newest run's below it
start = ''                # the prompt, FILE:path, or - for standard input; <|endoftext|> is the token; empty starts a document
interactive = False       # ask for one prompt after the other
num_samples = 1           # texts a prompt, written side by side
max_new_tokens = 200      # tokens a text, unless it ends itself
temperature = 1.0         # under 1 more predictable, 0 greedy (always the likeliest token)
top_k = 50                # choose among the k likeliest tokens; 0 = all
top_p = 1.0               # choose among the likeliest that together reach this probability; 1 = all
min_p = 0.0               # choose among those at least this share as likely as the likeliest; 0 = all
repetition_penalty = 1.0  # over 1 makes tokens that were there less likely; 1.1 to 1.3 break loops
stop = ''                 # a text ends before this string
context = 0               # tokens that the model looks back; 0 = as many as it was trained with
seed = 1337               # text i draws from seed + i
device = 'auto'           # auto, cpu, cuda, cuda:1, mps
compile = 'auto'          # True: faster int8 steps on a CPU, after up to 20 s; auto: a captured graph on a GPU; False: neither
configure(globals(), dict(num_samples=(1,), max_new_tokens=(1,), temperature=(0, 1e9), top_k=(0,), top_p=(0, 1), min_p=(0, 1),
                          repetition_penalty=(1e-3, 1e3), context=(0,), seed=(0, 2**63 - 1), device=pick_device,
                          compile=('auto', 'True', 'False')), 'lower --num_samples or --context')

AT_ONCE = 32  # texts in a batch: its cache stays under 3 GB for GPT-2 small
if hasattr(signal, 'SIGPIPE'):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends us quietly
sys.stderr = sys.stderr or open(os.devnull, 'w', encoding='utf-8')  # closed by 2>&-
for stream in filter(None, (sys.stdin, sys.stdout)):
    stream.reconfigure(encoding='utf-8', errors='surrogateescape')  # a prompt may hold any bytes
keep_freed_memory()
device = pick_device(device)
model, meta = load(checkpoint, device)
if device.startswith('cuda'):
    model.to(pick_dtype(device))
print(f"{meta['path']}: {model.num_params():,} parameters, step {meta['step']:,}", file=sys.stderr)
tokenizer = get_tokenizer(meta['tokenizer'])
if tokenizer.vocab_size != model.config.vocab_size:
    fail(f"{meta['path']}: {model.config.vocab_size:,} ids, and its tokenizer has {tokenizer.vocab_size:,}")
if context > model.config.block_size:
    fail(f'--context={context}: the model has {model.config.block_size} positions', 2)
window = context or model.trained_context


def write(prompt):
    """Print the prompt and its texts: the first as it comes, the others, written at the same time, after it."""
    ids = tokenizer.encode(prompt, special_tokens=True) or [tokenizer.start]
    if len(ids) > window:
        print(f'the prompt has {len(ids):,} tokens and the model looks back {window:,}: it sees the end', file=sys.stderr)
    began, first, tokens, stopped = time.perf_counter(), 0.0, 0, False
    for i in range(0, num_samples, AT_ONCE):
        if stopped:
            break
        count = min(num_samples - i, AT_ONCE)
        streams, texts = [TextStream(tokenizer, stop) for _ in range(count)], [[] for _ in range(count)]
        print('\n---------------\n' * (i > 0) + prompt, end='', flush=True)
        steps = model.generate(torch.tensor([ids]), max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, count,
                               seed + i, context, compile=compile)
        try:
            for step in steps:
                first = first or time.perf_counter() - began
                tokens += sum(not stream.ended for stream in streams)
                for text, stream, id in zip(texts, streams, step.tolist()):
                    text.append(stream.feed(id))
                print(texts[0][-1], end='', flush=True)
                if all(stream.ended for stream in streams):
                    break
        except KeyboardInterrupt:  # only where interactive
            stopped = True
            print(' (stopped)', file=sys.stderr)
        steps.close()
        print(streams[0].rest(), end='')
        for text, stream in zip(texts[1:], streams[1:]):
            print('\n---------------\n' + prompt + ''.join(text) + stream.rest(), end='')
    print(flush=True)
    seconds = time.perf_counter() - began
    print(f'{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s, the first after {first * 1000:.0f} ms', file=sys.stderr)


def ask():
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input('Prompt> ')
    print('Prompt> ', end='', file=sys.stderr, flush=True)  # stdout is the texts alone
    return input()


if interactive:
    print('Type a prompt and Enter. Ctrl-C stops a text; at the prompt Ctrl-D or Ctrl-C leaves.', file=sys.stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdin.isatty():
        import readline  # noqa: F401  (arrow keys and history)
    while True:
        try:
            write(ask())
        except ValueError as error:  # a character that the model does not know
            print(f'sample.py: {error}', file=sys.stderr)
        except (EOFError, KeyboardInterrupt) as leaving:
            print(file=sys.stderr)
            sys.exit(130 if isinstance(leaving, KeyboardInterrupt) else 0)
elif start == 'FILE:':
    fail('--start=FILE: names no file; --start=FILE:prompt.txt does', 2)
elif start == '-' or start.startswith('FILE:'):
    write(''.join(read_text(0 if start == '-' else start[5:])))
else:
    write(start)
