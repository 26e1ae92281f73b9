"""Text from a trained model, on stdout as it is generated; everything else goes to stderr.

$ python sample.py --start="Hello"    # the model in out/, or else the newest run in its subfolders
$ python sample.py --checkpoint=out/quickstart --num_samples=3 --max_new_tokens=500 --temperature=0.8
$ python sample.py --start=FILE:prompt.txt --temperature=0    # greedy; --start=- reads standard input
$ python sample.py --interactive    # asks for one prompt after the other
"""
import contextlib
import signal
import sys
import time

import torch

from config import configure, fail
from model import Index, keep_freed_memory, load, pick_device
from prepare import get_tokenizer, load_data_of, read_text, stream_texts

checkpoint = 'out'        # a model file, a folder of them (see README) or a Hub id
start = ''                # the prompt, FILE:path, or - for standard input; <|endoftext|> is the token
interactive = False       # ask for one prompt after the other
num_samples = 1           # texts for each prompt, generated together
max_new_tokens = 200      # tokens of a text, unless it ends earlier
temperature = 1.0         # below 1 more predictable, 0 greedy (always the likeliest token)
top_k = 50                # choose among the k likeliest tokens; 0 = all
top_p = 1.0               # choose among the likeliest tokens that together have this probability; 1 = all
min_p = 0.0               # leave out tokens less likely than this share of the likeliest one; 0 = none
repetition_penalty = 1.0  # above 1 makes tokens of the text so far less likely; 1.1 to 1.3 break loops
stop = ''                 # a text ends before this string
context = 0               # tokens the model attends to; 0 = as many as it was trained with
seed = 1337               # text i is drawn with seed + i
device = 'auto'           # auto, cpu, cuda, cuda:1, mps
compile = 'auto'          # long texts by a CUDA graph or a CPU trace; on a GPU True compiles too, in 20-50 s
drafts = 'auto'           # guess ids from the training text, on a CPU; auto = for a vocabulary over 16,384
configure(globals(), dict(
    num_samples=(1,), max_new_tokens=(1,), temperature=(0, 1e9), top_p=(0, 1), min_p=(0, 1),
    repetition_penalty=(1e-3, 1e3), seed=(0, 2**63 - 1), device=pick_device,
    compile=('auto', 'True', 'False'), drafts=('auto', 'True', 'False')), 'lower --num_samples or --context')
SEPARATOR = '\n---------------\n'


def write(prompt):
    """Print a prompt and its first text as that is generated, then its other texts."""
    ids = tokenizer.encode(prompt, special_tokens=True) or [tokenizer.start]
    if len(ids) > window:
        print(f'the prompt has {len(ids):,} tokens; the model reads the last {window:,}', file=sys.stderr)
    began, tokens, passes = time.perf_counter(), 0, index.passes - 1 if index else 0  # -1: the prompt's pass
    for i in range(0, num_samples, 32):  # 32 at once: their KV cache stays below 3 GB for GPT-2 small
        count, printed = min(num_samples - i, 32), 0
        steps = model.generate(torch.tensor([ids]), max_new_tokens, temperature, top_k, top_p, min_p,
                               repetition_penalty, count, seed + i, context, compile, index)
        print(SEPARATOR * (i > 0) + prompt, end='', flush=True)
        for texts in stream_texts(steps, tokenizer, count, stop):
            print(texts[0].text[printed:], end='', flush=True)
            printed = len(texts[0].text)
        print(''.join(SEPARATOR + prompt + text.text for text in texts[1:]), end='')
        tokens += sum(len(text.ids) for text in texts)
    print(flush=True)
    seconds = time.perf_counter() - began
    drafted = f', {tokens / (index.passes - passes):.1f} tokens a pass' if index else ''
    print(f'{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s{drafted}', file=sys.stderr)


if hasattr(signal, 'SIGPIPE'):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when `| head` closes the pipe
keep_freed_memory()
model, meta = load(checkpoint, pick_device(device))
print(f"{meta['path']}: {model.num_params():,} parameters, step {meta['step']:,}", file=sys.stderr)
tokenizer, window = get_tokenizer(meta['tokenizer']), context or model.trained_context
if context > model.config.block_size:
    fail(f'--context={context}: the model has {model.config.block_size} positions', 2)
# auto: four ids of a small vocabulary match too often to be good guesses
wanted = drafts == 'True' or drafts == 'auto' and tokenizer.vocab_size > 2**14
train = load_data_of(meta)[0] if wanted and num_samples == 1 and pick_device(device) == 'cpu' else None
index = None if train is None else Index(train)
if drafts == 'True' and not index:
    fail("--drafts=True: needs a single text, a CPU, and the model's training data in data/; leave it out", 2)
if start == '-' or start.startswith('FILE:'):
    start = ''.join(read_text(0 if start == '-' else start[5:]))
if not interactive:
    write(start)
    sys.exit()
print('Type a prompt and Enter. Ctrl-C stops a text; at the prompt Ctrl-D or Ctrl-C leaves.', file=sys.stderr)
signal.signal(signal.SIGINT, signal.default_int_handler)  # raises KeyboardInterrupt
with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401  (gives input() arrow keys and history)
while True:
    try:
        # a stdout that is no terminal gets the texts alone, so input() asks on stderr
        with contextlib.redirect_stdout(sys.stdout if sys.stdout and sys.stdout.isatty() else sys.stderr):
            prompt, start = start or input('Prompt> '), ''  # a prompt that was given comes first
    except (EOFError, OSError, KeyboardInterrupt) as leaving:  # OSError: the prompt was all of stdin
        sys.exit(130 if isinstance(leaving, KeyboardInterrupt) else 0)
    try:
        write(prompt)
    except (ValueError, KeyboardInterrupt) as error:  # a character unknown to the model, or Ctrl-C
        print(f'\nsample.py: {str(error) or "stopped"}', file=sys.stderr)
