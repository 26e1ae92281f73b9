"""
The page: a Gradio demo of the newest model, here or as a Hugging Face Space.

$ python app.py                                        # http://127.0.0.1:7860, ready in a few seconds
$ python app.py --checkpoint=out/model_int8.pt --host=0.0.0.0 --auth=name:password
"""
import concurrent.futures
import functools
import html
import os
import queue
import random
import socket
import threading
import time

import numpy as np
import torch

from config import configure, fail, given
from model import GPT, GPTConfig, device_name, find, keep_freed_memory, load, local, pick_device, pick_dtype, read
from prepare import TextStream, get_tokenizer

checkpoint = ''      # a model file, a folder of them or a Hub repository's id; empty = $FOLIO_CHECKPOINT, else out
host = ''            # address to listen at; empty = Gradio's own: $GRADIO_SERVER_NAME, else 127.0.0.1
port = 7860          # where it is taken, the next free one
share = False        # a public link through Gradio's servers, for a week
auth = ''            # name:password that visitors must give; empty = $FOLIO_AUTH, else none
max_tokens = 200     # new tokens that one may ask for
max_prompt = 10_000  # characters that a prompt may have
at_once = 1          # visitors that generate at the same time; more share the cores
queue_size = 32      # visitors that wait; one more is told to come back
max_seconds = 120    # that a visitor's texts may take
device = 'auto'      # auto, cpu, cuda, cuda:1, mps
configure(globals(), dict(port=(1, 65535), max_tokens=(1,), max_prompt=(1,), at_once=(1,), queue_size=(1,), max_seconds=(1,), device=pick_device))
auth = auth or os.environ.get('FOLIO_AUTH', '')
if auth and not all(auth.partition(':')):
    fail('--auth: write name:password', 2)

keep_freed_memory()
device = pick_device(device)
os.environ.update(GRADIO_ANALYTICS_ENABLED='False', HF_HUB_DISABLE_TELEMETRY='1')
import gradio as gr  # noqa: E402  (after what it reads)

checkpoint = local(checkpoint or os.environ.get('FOLIO_CHECKPOINT') or 'out')
EXAMPLES = ['To be, or not to be,', "All the world's a stage,", 'Hello, my name is', 'Once upon a time',
            'We are accounted poor citizens, the', 'Elizabeth']
NO_MODEL = 'There is no model yet. <code>python train.py config/quickstart.py</code> makes one in seconds, and this page takes it up.'
TEXTS = 4  # at most, for a visitor
loading, ending = threading.Lock(), threading.Event()
workers = concurrent.futures.ThreadPoolExecutor(at_once)


# the models -----------------------------------------------------------------------------------------------------------

def run_folders():
    """The folder of checkpoints and those one below it, as each run has its own; empty where there is none."""
    if not os.path.isdir(checkpoint):
        return []
    return [checkpoint, *(entry.path for entry in os.scandir(checkpoint) if entry.is_dir())]


def model_files():
    """Paths of the model files to choose among, the one that load() would take first."""
    if os.path.isfile(checkpoint):
        return [checkpoint]
    paths = [os.path.join(folder, name) for folder in run_folders() for name in os.listdir(folder)
             if name.startswith(('model', 'best')) and name.endswith('.pt')]
    paths.sort(key=os.path.getmtime, reverse=True)
    try:
        first = [find(checkpoint)]
    except (OSError, ValueError):
        first = []
    return first + [path for path in paths if path not in first]


@functools.lru_cache(maxsize=3)
def loaded(path, changed):
    model, meta = load(path, device)
    if device.startswith('cuda'):
        model.to(pick_dtype(device))
    return model, meta, get_tokenizer(meta['tokenizer'])


def get_model(path):
    """(model, meta, tokenizer) of one of model_files(), loaded once. Raises ValueError with a sentence for a visitor."""
    paths = model_files()
    if not paths:
        raise ValueError('There is no model yet: python train.py config/quickstart.py makes one in seconds.')
    path = path or paths[0]
    if path not in paths:
        raise ValueError('There is no such model here; choose one of the list.')
    with loading:
        return loaded(path, os.path.getmtime(path))


def describe(path):
    """A line of HTML about a model."""
    try:
        return description(path, os.path.getmtime(path)) if path else NO_MODEL
    except (ValueError, OSError) as error:
        return html.escape(str(error))


@functools.lru_cache(maxsize=32)
def description(path, changed):
    meta = read(path, check=False)  # tensors stay on disk: see on_worker
    config = GPTConfig(**meta['config'])
    with torch.device('meta'):
        parameters = GPT(config).num_params()
    losses = ', '.join(f"{name.removesuffix('_loss')} {loss:.4f}" for name, loss in meta.get('losses', {}).items())
    return html.escape(f"{parameters:,} parameters, {config.quantized or 'float32'}, {os.path.getsize(path) / 1e6:.0f} MB, on "
                       f"{device_name(device)}; trained context {meta['trained_context']:,} tokens, step {meta['step']:,}"
                       + (f'; loss: {losses}' if losses else ''))


# memory or invention --------------------------------------------------------------------------------------------------

def grams(ids, n):
    """A hash of every n ids in turn, uint64 (len - n + 1,): those of a polynomial, overflowing."""
    powers = np.cumprod(np.full(n, 6364136223846793005, dtype=np.uint64))
    ids = np.asarray(ids).astype(np.uint64) + np.uint64(1)
    return sum((ids[i:len(ids) - n + 1 + i] * powers[i] for i in range(n)), np.zeros(max(len(ids) - n + 1, 0), np.uint64))


@functools.lru_cache(maxsize=2)
def training_grams(path, changed, n):
    return np.sort(grams(np.memmap(path, dtype='<u2', mode='r'), n))


def recited(ids, meta):
    """Which ids stand, with at least n - 1 neighbours, verbatim in the training data: bools; None where that is not here.

    n is 8 tokens, or 30 characters, about as much.
    """
    path, n = f"data/{meta.get('dataset', '')}/train.bin", 8 if meta['tokenizer']['name'] == 'gpt2' else 30
    if not meta.get('dataset') or not os.path.exists(path) or not 2 * n <= os.path.getsize(path) <= 2**29:
        return None  # a hash is four times as long as its token
    with loading:
        known, found = training_grams(path, os.path.getmtime(path), n), np.zeros(len(ids), dtype=bool)
    if len(ids) >= n and len(known):
        own = grams(ids, n)
        for i in np.flatnonzero(known[np.searchsorted(known, own).clip(max=len(known) - 1)] == own):
            found[i:i + n] = True
    return found


def highlighted(ids, begin, tokenizer, found):
    """HTML of the ids from `begin` on, the recited spans marked; characters that straddle tokens go with their last."""
    stream, parts = TextStream(tokenizer), []
    for i in range(begin, len(ids)):
        text = html.escape(stream.feed(ids[i]))
        parts.append(f'<mark>{text}</mark>' if found[i] and text else text)
    return ''.join(parts).replace('</mark><mark>', '')


# generation -----------------------------------------------------------------------------------------------------------

def number(name, value, least, greatest, whole=False):
    """A visitor's number, brought within its limits. Raises ValueError with a sentence for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f'{name} must be a number from {least:,} to {greatest:,}.')
    value = min(max(value, least), greatest)
    return int(value) if whole else float(value)


def write(path, prompt, max_new_tokens, temperature, top_k, top_p, repetition_penalty, num_samples, seed):
    """Yield a dict some times a second: the texts so far, their ids, why each ended, tokens, seconds, seed.

    Everything comes from visitors, is checked here, and lives in this call alone. Raises ValueError with a sentence.
    """
    if not isinstance(prompt, str):
        raise ValueError('The prompt must be a text.')
    if len(prompt) > max_prompt:
        raise ValueError(f'The prompt has {len(prompt):,} characters; {max_prompt:,} is the most. Please shorten it.')
    seed = seed.strip() if isinstance(seed, str) else seed
    if isinstance(seed, str) and seed.isdecimal() and len(seed) < 20:
        seed = int(seed)
    if seed is None or seed == '':
        seed = random.randrange(2**31)
    texts = number('Number of texts', num_samples, 1, TEXTS, True)
    settings = dict(max_new_tokens=number('New tokens', max_new_tokens, 1, max_tokens, True),
                    temperature=number('Temperature', temperature, 0, 100), top_k=number('Top-k', top_k, 0, 10**6, True),
                    top_p=number('Top-p', top_p, 0, 1), repetition_penalty=number('Repetition penalty', repetition_penalty, 0.1, 10),
                    seed=number('Seed', seed, 0, 2**53, True))
    model, meta, tokenizer = get_model(path)
    prompt = prompt.encode('utf-8', 'replace').decode()  # a lone surrogate cannot be sent back
    ids = tokenizer.encode(prompt) or [tokenizer.start]
    while True:
        streams, written, new = [TextStream(tokenizer) for _ in range(texts)], [prompt] * texts, [[] for _ in range(texts)]
        began = shown = time.perf_counter()
        tokens, state = 0, dict(prompt=prompt, ids=ids, new=new, meta=meta, tokenizer=tokenizer, seed=settings['seed'])

        def report(ended='writing'):
            ended = [stream.ended or ended for stream in streams]
            return dict(state, texts=list(written), ended=ended, tokens=tokens, seconds=time.perf_counter() - began)
        steps = model.generate(torch.tensor([ids]), num_samples=texts, **settings)
        try:
            for step in steps:
                for i, (stream, id) in enumerate(zip(streams, step.tolist())):
                    if not stream.ended:
                        tokens += 1
                        written[i] += stream.feed(id)
                        new[i].append(id)
                if all(stream.ended for stream in streams):
                    break
                if tokens == texts or time.perf_counter() - shown > 0.08:
                    shown = time.perf_counter()
                    yield report()
                if time.perf_counter() - began > max_seconds:
                    yield report('the time is up')
                    return
            written = [text + stream.rest() for text, stream in zip(written, streams)]
            yield report('all tokens written')
            return
        except RuntimeError as error:
            if 'memory' not in str(error):
                raise
            if texts == 1:
                yield report('out of memory')
                return
            texts //= 2  # out of memory: again with fewer
        finally:
            steps.close()


def on_worker(items):
    """Yield what a generator yields, which runs on one of at_once threads, and stops when this one is closed.

    Gradio resumes a generator on any of forty threads. Each thread that computes gets OpenMP threads of its own, and as
    soon as there are more of them than cores, libgomp lets all of them sleep at every barrier: two thirds of the speed.
    """
    results, closed = queue.SimpleQueue(), threading.Event()

    def work():
        try:
            for item in items:
                if closed.is_set() or ending.is_set():
                    break
                results.put((item, None))
            items.close()
            results.put((None, None))
        except Exception as error:
            results.put((None, error))
    workers.submit(work)
    try:
        while True:
            item, error = results.get()
            if error:
                raise error
            if item is None:
                return
            yield item
    finally:
        closed.set()


def said(f, escape=str):
    """f, a generator, with what it refuses, and what goes wrong, told to the visitor in a sentence; the page's is HTML."""
    @functools.wraps(f)
    def wrapped(*args, **kwargs):
        try:
            yield from f(*args, **kwargs)
        except (ValueError, OSError) as error:
            raise gr.Error(escape(str(error)), print_exception=False) from None
        except Exception as error:
            print(f'app.py: {type(error).__name__}: {error}', flush=True)
            raise gr.Error('Something went wrong here. Please try again, with fewer or shorter texts.', print_exception=False) from None
    return wrapped


@said
def generate(prompt: str, max_new_tokens: int = 100, temperature: float = 1.0, top_k: int = 50, top_p: float = 1.0,
             repetition_penalty: float = 1.0, num_samples: int = 1, seed: int | None = None) -> list[str]:
    """Continue a prompt: every update is the list of the texts so far, the prompt included."""
    for state in on_worker(write('', prompt, max_new_tokens, temperature, top_k, top_p, repetition_penalty, num_samples, seed)):
        yield state['texts']


@functools.partial(said, escape=html.escape)
def show(path, *settings):
    """The page's own: HTML of the panels, and of a line below."""
    for state in on_worker(write(path, *settings)):
        yield panels(state, [html.escape(text[len(state['prompt']):]) for text in state['texts']]), status(state)
    ids, texts, shares = state['ids'], [], []
    for new in state['new']:
        found = recited(ids + new, state['meta'])
        if found is None:
            yield gr.skip(), f'{status(state)}<br>What is recited is not marked: the training data is not on this machine.'
            return
        shares.append(f'{found[len(ids):].mean() if new else 0:.0%}')
        texts.append(highlighted(ids + new, len(ids), state['tokenizer'], found))
    n = '8 tokens' if state['meta']['tokenizer']['name'] == 'gpt2' else '30 characters'
    yield panels(state, texts), (f"{status(state)}<br>{', '.join(shares)} stands word for word in the training text (marked; {n} or more "
                                 f'in a row). Models of a small text recite it.')


def panels(state, texts):
    copy = ("const text = this.parentNode.querySelector('pre'); navigator.clipboard ? navigator.clipboard.writeText(text.textContent) : "
            "(getSelection().selectAllChildren(text), document.execCommand('copy')); this.textContent = 'Copied'")
    return ''.join(f'<div class="text"><button onclick="{copy}">Copy</button>'
                   f'<pre><span class="prompt">{html.escape(state["prompt"])}</span>{text}</pre></div>' for text in texts)


def status(state):
    rate = state['tokens'] / max(state['seconds'], 1e-9)
    ended = ', '.join(dict.fromkeys(state['ended']))
    return html.escape(f"{state['tokens']:,} tokens in {state['seconds']:.1f} s, {rate:.0f} tokens/s; seed {state['seed']}; {ended}")


# the training curve ---------------------------------------------------------------------------------------------------

def newest_log():
    """The path of the log.csv that was written to last; '' where there is none."""
    paths = [path for path in (os.path.join(folder, 'log.csv') for folder in run_folders()) if os.path.exists(path)]
    return max(paths, key=os.path.getmtime, default='')


def curve(path):
    """Tables of the losses and of the learning rate by step, from a log.csv, and a line about it."""
    import pandas
    log = pandas.read_csv(path, usecols=['step', 'loss', 'lr', 'train_loss', 'val_loss'])
    thinned = log.val_loss.notna() | (np.arange(len(log)) % max(len(log) // 1000, 1) == 0)
    thinned.iloc[-1] = True
    log, run = log[thinned], os.path.join(os.path.dirname(path), 'ckpt.pt')
    threshold = read(run, check=False).get('settings', {}).get('loss_threshold', 0) if os.path.exists(run) else 0
    log = log.rename(columns={'loss': 'batches', 'train_loss': 'train', 'val_loss': 'validation'}).assign(threshold=threshold or None)
    losses = log.melt('step', ['batches', 'train', 'validation', 'threshold'], 'curve', 'loss').dropna()
    return losses.astype({'loss': float}), log[['step', 'lr']], html.escape(f'{path}, step {log.step.iloc[-1]:,}')


def look(choice, known):
    """What is new on this machine, for a page that knows `known`: its choice of models, the line about one, and the curves."""
    paths, log = model_files(), newest_log()
    path = choice if choice in paths else paths[0] if paths else None
    here = [[path, os.path.getmtime(path)] for path in paths], [log, log and os.path.getmtime(log)]
    new = [gr.skip()] * 5
    if not known or here[0] != known[0] or path != choice:
        new[:2] = gr.update(choices=paths, value=path), describe(path)
    if not known or here[1] != known[1]:
        try:
            new[2:] = curve(log) if log else (None, None, 'No <code>log.csv</code> here: a training in this folder shows its curve.')
        except (ValueError, IndexError, KeyError, OSError):  # being written, or cut short
            new[2:] = None, None, f'{html.escape(log)} holds no steps yet, or cannot be read.'
    return *new, list(here)


# the page -------------------------------------------------------------------------------------------------------------

CSS = '''
.text { position: relative; border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px; margin-bottom: 8px }
.text pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: 0; padding-right: 60px; background: none; border: 0 }
.text .prompt { color: var(--body-text-color-subdued) }
.text mark { background: rgba(250, 180, 60, .35); color: inherit; border-radius: 3px }
.text button { position: absolute; top: 8px; right: 8px; font-size: 12px; color: var(--body-text-color-subdued); cursor: pointer }
.line { color: var(--body-text-color-subdued); font-size: 14px; min-height: 40px }
#status [data-testid=status-tracker] { height: 70px }  /* the place in the queue */
'''
HEAD = '''<script>document.addEventListener('keydown', event => {
    if (event.ctrlKey && event.key === 'Enter') document.querySelector('#generate').click() })</script>'''

with gr.Blocks(title='folio', analytics_enabled=False) as page:
    gr.Markdown('# folio\nGPT-2, trained, sampled, quantized and served in a few short scripts.')
    with gr.Tab('Text'):
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(label='Prompt', lines=3, max_lines=12, placeholder='The beginning of a text. Ctrl-Enter or Shift-Enter writes on.',
                                    elem_id='prompt')
                with gr.Row():
                    go = gr.Button('Generate', variant='primary', elem_id='generate')
                    halt = gr.Button('Stop', elem_id='stop')
                gr.Examples(EXAMPLES, prompt, label='Examples')
                texts = gr.HTML()
                line = gr.HTML(elem_classes='line', elem_id='status')
            with gr.Column(scale=1, min_width=260):
                choice = gr.Dropdown(model_files(), label='Model', elem_id='model')
                about = gr.HTML(elem_classes='line', elem_id='about')
                settings = [gr.Slider(min(10, max_tokens), max_tokens, min(100, max_tokens), step=1, label='New tokens'),
                            gr.Slider(0, 2, 1.0, step=0.05, label='Temperature', info='0 always takes the likeliest token'),
                            gr.Slider(0, 200, 50, step=1, label='Top-k', info='0 = all'),
                            gr.Slider(0, 1, 1.0, step=0.01, label='Top-p'),
                            gr.Slider(0.5, 2, 1.0, step=0.05, label='Repetition penalty'),
                            gr.Slider(1, TEXTS, 1, step=1, label='Texts'),
                            gr.Textbox(label='Seed', info='empty = a new one each time', max_lines=1)]
    with gr.Tab('Training'):
        source = gr.HTML(elem_classes='line')
        losses = gr.LinePlot(x='step', y='loss', color='curve', title='Loss', height=320)
        rates = gr.LinePlot(x='step', y='lr', title='Learning rate', height=200)

    writing = gr.on([go.click, prompt.submit], show, [choice, prompt, *settings], [texts, line], api_visibility='private',
                    concurrency_id='generate', concurrency_limit=at_once, show_progress='minimal', show_progress_on=line)
    halt.click(lambda line: (line or '').replace('writing', 'stopped'), line, line, cancels=writing, api_visibility='private', show_progress='hidden',
               queue=False)
    choice.change(describe, choice, about, api_visibility='private', show_progress='hidden', queue=False)

    known = gr.State()
    for event in (page.load, gr.Timer(3).tick):
        event(look, [choice, known], [choice, about, losses, rates, source, known], api_visibility='private', show_progress='hidden',
              queue=False)
    gr.api(generate, api_name='generate', concurrency_id='generate', concurrency_limit=at_once)
page.queue(max_size=queue_size)


def fill_in(block_fn, inputs):
    """In place of Gradio's own check, which shows a caller its insides: values left away at the end take their defaults."""
    if block_fn.api_name == 'generate':
        inputs += generate.__wrapped__.__defaults__[max(len(inputs) - 1, 0):] if inputs else ('', *generate.__wrapped__.__defaults__)
    if len(inputs) < len(block_fn.inputs):
        raise gr.Error('The call lacks values.', print_exception=False)


page.validate_inputs = fill_in

if __name__ == '__main__':
    if model_files():
        workers.submit(get_model, '').result()  # so that the first visitor need not wait
    wanted = port if 'port' in given else int(os.environ.get('GRADIO_SERVER_PORT') or port)
    for port in range(wanted, min(wanted + 100, 65536)):
        try:
            socket.create_connection((host or '127.0.0.1', port), 0.2).close()
        except OSError:  # nobody there
            break
    if port != wanted:
        print(f'port {wanted} is taken; taking {port}', flush=True)
    try:
        page.launch(server_name=host or None, server_port=port, share=share, auth=tuple(auth.split(':', 1)) if auth else None,
                    theme=gr.themes.Soft(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace']), css=CSS, head=HEAD,
                    footer_links=['api'], show_error=True, max_file_size=1, ssr_mode=False)
    finally:
        ending.set()  # what is still being written
        workers.shutdown(cancel_futures=True)
