"""
A Gradio page that writes with a model, here or on a Hugging Face Space.

$ python app.py                                        # http://127.0.0.1:7860, ready in a few seconds
$ python app.py --checkpoint=out/model_int8.pt --host=0.0.0.0 --auth=name:password
"""
import asyncio
import contextlib
import ctypes
import functools
import glob
import html
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from config import configure, fail, given
from model import GPTConfig, Index, device_name, download, find, keep_freed_memory, load, pick_device, read
from prepare import TextStream, get_tokenizer, load_data_of, stream_texts

checkpoint = ''      # a model file, a folder of them or a Hub id; empty = $FOLIO_CHECKPOINT, else out
host = ''            # address to listen at; empty = Gradio's own: $GRADIO_SERVER_NAME, else 127.0.0.1
port = 7860          # if not given: $GRADIO_SERVER_PORT, else the first free one from 7860 on
share = False        # a public link through Gradio's servers, for a week
auth = ''            # name:password that visitors must give; empty = $FOLIO_AUTH, else none
max_tokens = 200     # most new tokens that a visitor may ask for
max_prompt = 10_000  # most characters in a prompt
at_once = 1          # visitors served at the same time; they share the cores
queue_size = 32      # visitors that wait; one more is told to come back
max_seconds = 120    # most seconds that a visitor's texts may take
device = 'auto'      # auto, cpu, cuda, cuda:1, mps
configure(globals(), dict(port=(1, 65535), max_tokens=(1,), max_prompt=(1,), at_once=(1,), queue_size=(1,),
                          max_seconds=(1,), device=pick_device))
login = auth or os.environ.get('FOLIO_AUTH', '')
if login and not all(login.partition(':')):
    fail('--auth: write name:password', 2)

keep_freed_memory()
os.environ.update(GRADIO_ANALYTICS_ENABLED='False', HF_HUB_DISABLE_TELEMETRY='1')
import gradio as gr  # noqa: E402  (Gradio reads these variables when it is imported)
import pandas  # noqa: E402  (Gradio brings it)

chip = pick_device(device)
home = download(checkpoint or os.environ.get('FOLIO_CHECKPOINT') or 'out')  # where the models are
NO_MODEL = 'There is no model yet: python train.py config/quickstart.py makes one in a minute.'
EXAMPLES = ['To be, or not to be,', 'Once upon a time', 'We are accounted poor citizens, the', 'Elizabeth']
NUMBERS = dict(  # what a visitor may set: label, least and greatest value, default, step, and a hint
    max_new_tokens=('New tokens', 1, max_tokens, min(100, max_tokens), 1, None),
    temperature=('Temperature', 0.0, 2.0, 1.0, 0.05, '0 = always the likeliest token'),
    top_k=('Top-k', 0, 1000, 50, 1, '0 = all'),
    top_p=('Top-p', 0.0, 1.0, 1.0, 0.01, None),
    repetition_penalty=('Repetition penalty', 0.5, 2.0, 1.0, 0.05, None),
    num_samples=('Texts', 1, 4, 1, 1, None))

# Gradio would run a generator's steps on any of forty threads, and torch gives each of these its own OpenMP
# threads. With more of those than cores, libgomp puts them to sleep at every barrier, which costs a third of
# the speed. So one thread runs all steps of a visitor's texts; there are `at_once` of them.
# `idle` holds (thread, its ident), `gone` the idents of the threads whose visitor has left.
idle, gone = asyncio.Queue(), set()
for thread in [ThreadPoolExecutor(1) for _ in range(at_once)]:
    idle.put_nowait((thread, thread.submit(threading.get_ident).result()))


# -- the models ----------------------------------------------------------------------------------------------
# Functions with an argument `changed`, a file's time, are cached: they read a file again when that changes.

def newest_first(pattern):
    """Paths, the newest first, of the files in `home` and its subfolders (one a run) that match a pattern."""
    paths = glob.glob(f'{glob.escape(home)}/{pattern}') + glob.glob(f'{glob.escape(home)}/*/{pattern}')
    return sorted(paths, key=os.path.getmtime, reverse=True)


def model_files():
    """Paths of the models to choose from; the first is the one that load() takes."""
    paths = [path for path in newest_first('*.pt') if os.path.basename(path).startswith(('model', 'best'))]
    with contextlib.suppress(OSError, ValueError):
        paths.insert(0, find(home))
    return list(dict.fromkeys(paths))  # each once


def get_model(path):
    """What loaded() gives for a path of model_files(); '' is the first. Raises ValueError for any other."""
    paths = model_files()
    path = path or (paths or [None])[0]
    if path not in paths:
        raise ValueError('There is no such model here; choose one from the list.' if paths else NO_MODEL)
    return loaded(path, os.path.getmtime(path))


def stop_if_gone(*_):
    """Raise InterruptedError if this thread's visitor has left, to end a long prompt between two layers."""
    if threading.get_ident() in gone:
        raise InterruptedError('Stopped.')


@functools.lru_cache(maxsize=3)
def loaded(path, changed):
    """(model, tokenizer, Index of the training text, or None if that is not here)."""
    with contextlib.suppress(AttributeError, TypeError):  # glibc keeps most of a model that was replaced
        ctypes.CDLL(None).malloc_trim(0)
    model, meta = load(path, chip)
    print(path, file=sys.stderr)
    for block in model.h if chip == 'cpu' else ():  # a GPU's pass is too short to stop
        block.ln_1.register_forward_pre_hook(stop_if_gone)
    train, _ = load_data_of(meta)
    return model, get_tokenizer(meta['tokenizer']), None if train is None else Index(train)


@functools.lru_cache(maxsize=32)
def description(path, changed):
    """A line of HTML about a model file, or about what is wrong with it."""
    try:
        meta = read(path, check=False)  # leaves the tensors on disk
        config = GPTConfig(**meta['config'])
    except (ValueError, OSError) as error:
        return html.escape(str(error))
    losses = ', '.join(f'{name} {loss:.4f}' for name, loss in meta.get('losses', {}).items())
    return html.escape(f"{config.num_params():,} parameters, {config.quantized or 'floats'}, on "
                       f"{device_name(chip)}; trained context {meta['trained_context']:,} tokens, "
                       f"step {meta['step']:,}{'; ' * bool(losses)}{losses}")


# -- memory or invention -------------------------------------------------------------------------------------

def recited(ids, index, n):
    """A bool for each id: whether it is part of a run of n ids that the training text's Index holds."""
    held = [index.holds(ids[i:i + n]) for i in range(len(ids) - n + 1)]
    # an id is part of the runs that begin at it or at one of the n - 1 before it
    return torch.tensor([any(held[max(i - n + 1, 0):i + 1]) for i in range(len(ids))])


def highlighted(ids, tokenizer, found):
    """HTML of the ids' text, the found parts marked. A character of several tokens counts with its last."""
    stream, parts = TextStream(tokenizer), []
    for id, mark in zip(ids, found):
        stream.feed(id)
        text, stream.text = html.escape(stream.text), ''  # what this id has added
        parts.append(f'<mark>{text}</mark>' if mark and text else text)
    return ''.join(parts).replace('</mark><mark>', '')


# -- generation ----------------------------------------------------------------------------------------------

def number(value, label, least, greatest):
    """A visitor's number, brought within its limits. Raises ValueError if it is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f'{label} must be a number from {least:,} to {greatest:,}.')
    return type(least)(min(max(value, least), greatest))


def write(path, prompt, seed, *numbers):
    """Yield, several times a second, a dict: a TextStream for each text, and facts about them.

    The arguments come from a visitor and are checked here; numbers are in the order of NUMBERS. Raises
    ValueError with a message for the visitor.
    """
    if not isinstance(prompt, str) or len(prompt) > max_prompt:
        raise ValueError(f'The prompt must be a text of at most {max_prompt:,} characters.')
    settings = {name: number(value, *row[:3]) for (name, row), value in zip(NUMBERS.items(), numbers)}
    seed = number(time.time_ns() % 2**31 if seed in (None, -1) else seed, 'Seed', 0, 2**53)
    model, tokenizer, index = get_model(path)
    prompt = prompt.encode('utf-8', 'replace').decode()  # a lone surrogate cannot be sent back
    ids = tokenizer.encode(prompt) or [tokenizer.start]
    drafts = index if tokenizer.vocab_size > 2**14 else None  # a small vocabulary's ids match too often
    steps = model.generate(torch.tensor([ids]), seed=seed, drafts=drafts, **settings)
    state = dict(prompt=prompt, ids=ids, index=index, tokenizer=tokenizer, seed=seed, ended='writing')
    began, shown = time.perf_counter(), 0.0
    for streams in stream_texts(steps, tokenizer, settings['num_samples']):
        seconds = time.perf_counter() - began
        state.update(streams=streams, seconds=seconds)
        if seconds > max_seconds:
            break
        if seconds > shown + 0.08:
            shown = seconds
            yield state
    yield {**state, 'ended': 'the time is up' if seconds > max_seconds else 'all tokens written'}


async def on_thread(steps, escape=str):
    """Yield what the generator `steps` yields, run on an idle thread; show its errors to the visitor.

    When this is closed (by Stop, or because the visitor leaves), `steps` ends after the layer in progress.
    """
    (thread, ident), loop = await idle.get(), asyncio.get_running_loop()
    try:
        while (item := await loop.run_in_executor(thread, next, steps, None)) is not None:
            yield item
    except (ValueError, OSError) as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None
    except Exception as error:
        print(f'app.py: {type(error).__name__}: {error}', flush=True)
        raise gr.Error('Something went wrong. Try fewer or shorter texts.', print_exception=False) from None
    finally:
        gone.add(ident)
        thread.submit(steps.close).add_done_callback(lambda _: gone.discard(ident))
        idle.put_nowait((thread, ident))


async def generate(prompt: str, max_new_tokens: int = 100, temperature: float = 1.0, top_k: int = 50,
                   top_p: float = 1.0, repetition_penalty: float = 1.0, num_samples: int = 1,
                   seed: int | None = None) -> list[str]:
    """Continue a prompt. Each update is a list of the texts so far, with the prompt."""
    numbers = max_new_tokens, temperature, top_k, top_p, repetition_penalty, num_samples
    async for state in on_thread(write('', prompt, seed, *numbers)):
        yield [state['prompt'] + stream.text for stream in state['streams']]


async def show(*inputs):
    """generate() for the page. Each update is HTML of the texts and of the line below them."""
    async for update in on_thread(updates(*inputs), html.escape):
        yield update


def updates(*inputs):
    """What show() yields: the texts as they come, and at the end with the recited parts marked."""
    for state in write(*inputs):
        yield panels(state, [html.escape(stream.text) for stream in state['streams']]), status(state)
    # these hold about as much text: 8 tokens of a large vocabulary, 12 of a small one, 30 characters
    tokenizer, texts, shares = state['tokenizer'], [], []
    n = 8 if tokenizer.vocab_size > 2**14 else 30 if tokenizer.eot is None else 12
    if not state['index']:  # the training data is not here, so nothing is marked
        return
    for stream in state['streams']:
        found = recited(state['ids'] + stream.ids, state['index'], n)[len(state['ids']):]
        texts.append(highlighted(stream.ids, tokenizer, found))
        shares.append(f'{found.float().mean():.0%}')
    yield panels(state, texts), (f"{status(state)}<br>{', '.join(shares)} is word for word in the training "
                                 f'text (marked; {n} tokens or more). Models of a small text recite it.')


def panels(state, texts):
    """HTML of the texts, each in a box with a button that copies it."""
    copy = ("getSelection().selectAllChildren(this.nextSibling); document.execCommand('copy'); "
            "this.textContent = 'Copied'")  # navigator.clipboard needs https or localhost
    prompt = html.escape(state['prompt'])
    return ''.join(f'<div class="text"><button onclick="{copy}">Copy</button>'
                   f'<pre><span class="prompt">{prompt}</span>{text}</pre></div>' for text in texts)


def status(state):
    """A line of HTML about the texts so far."""
    tokens, took = sum(len(stream.ids) for stream in state['streams']), max(state['seconds'], 1e-9)
    ended = ', '.join(dict.fromkeys(stream.ended or state['ended'] for stream in state['streams']))
    return f"{tokens:,} tokens in {took:.1f} s, {tokens / took:.0f} tokens/s; seed {state['seed']}; {ended}"


# -- the training curve --------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=4)
def curve(path, changed):
    """Tables of the losses and of the learning rate by step, from a log.csv, and a line about it."""
    log = pandas.read_csv(path)
    # one to two thousand points, of which the last row is one; evaluations are rare, and all are kept
    log = log[log.val_loss.notna() | (log.index[::-1] % max(len(log) // 1000, 1) == 0)]
    log = log.rename(columns={'loss': 'batches', 'train_loss': 'train', 'val_loss': 'validation'})
    losses = log.melt('step', ['batches', 'train', 'validation'], 'curve', 'loss').dropna()
    about = f'{path}, step {log.step.iloc[-1]:,}'
    if 'val_bpb' in log and len(measured := log.val_bpb.dropna()):
        about += f', {measured.iloc[-1]:.3f} bits per byte of the validation text'
    return losses, log[['step', 'lr']], html.escape(about)


def look(choice, known):
    """The list of models, a line about the chosen one, and the curves; no update where the page has them.

    The last item returned, `here`, comes back as `known`: the chosen path, and the files with their times.
    """
    paths, logs = model_files(), newest_first('log.csv')[:1]
    path = choice if choice in paths else (paths or [None])[0]
    models, log = [[(file, os.path.getmtime(file)) for file in files] for files in (paths, logs)]
    here = path, models, log
    if here == known and path == choice:
        return gr.skip()
    about = description(path, os.path.getmtime(path)) if path else NO_MODEL
    same = known and known[:2] == here[:2] and path == choice  # an update would close an open list of models
    try:
        shown = curve(*log[0])
    except (ValueError, LookupError, AttributeError, OSError):  # there is none, or it is being written
        shown = None, None, 'A training in this folder shows its curve here, once log.csv holds steps.'
    return gr.skip() if same else gr.update(choices=paths, value=path), about, *shown, here


# -- the page ------------------------------------------------------------------------------------------------

CSS = '''
.text { position: relative; border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px }
.text pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin-right: 60px }
.text mark { background: rgba(250, 180, 60, .35); color: inherit; border-radius: 3px }
.text button { position: absolute; top: 8px; right: 8px; font-size: 12px; cursor: pointer }
.prompt, .line { color: var(--body-text-color-subdued); min-height: 40px }
#status [data-testid=status-tracker] { height: 70px }  /* the place in the queue */
.dark button[aria-selected=true] { color: var(--primary-300) }
#status .error { display: none }  /* an "Error" after some Stops; real ones come as a message too */'''

quietly = dict(api_visibility='private', show_progress='hidden', queue=False)
in_turn = dict(concurrency_id='generate', concurrency_limit=at_once)

with gr.Blocks(title='folio') as page:
    gr.Markdown('# folio\nGPT-2, trained, sampled, quantized and served in a few short scripts.')
    with gr.Tab('Text'), gr.Row():
        with gr.Column(scale=2):
            # a longer text is cut off: Gradio's page cannot say that a request was too large
            prompt = gr.Textbox(label='Prompt', lines=3, max_lines=12, max_length=2 * max_prompt,
                                elem_id='prompt', info='The beginning of a text. Shift-Enter generates.')
            with gr.Row():
                go = gr.Button('Generate', variant='primary', elem_id='generate')
                halt = gr.Button('Stop', elem_id='stop')
            gr.Examples(EXAMPLES, prompt, label='Examples')
            texts, line = gr.HTML(), gr.HTML(elem_classes='line', elem_id='status')
        with gr.Column(scale=1, min_width=260):
            choice = gr.Dropdown(model_files(), label='Model', elem_id='model')
            about, known = gr.HTML(elem_classes='line', elem_id='about'), gr.State()
            sliders = [gr.Slider(least, greatest, default, step=step, label=label, info=hint)
                       for label, least, greatest, default, step, hint in NUMBERS.values()]
            sliders[0].minimum = min(10, max_tokens)  # of the page alone; the API takes 1
            seed = gr.Number(-1, label='Seed', info='-1 = a new one each time', precision=0)
    with gr.Tab('Training'):
        source = gr.HTML(elem_classes='line')
        losses = gr.LinePlot(x='step', y='loss', color='curve', title='Loss', height=320)
        rates = gr.LinePlot(x='step', y='lr', title='Learning rate', height=200)

    writing = gr.on([go.click, prompt.submit], show, [choice, prompt, seed, *sliders], [texts, line],
                    api_visibility='private', show_progress='minimal', show_progress_on=line, **in_turn)
    halt.click(None, cancels=writing).then(  # the last update may come after the click
        lambda line: str(line or '').replace('writing', 'stopped'), line, line, **quietly)
    gr.on([page.load, gr.Timer(3).tick, choice.change], look, [choice, known],
          [choice, about, losses, rates, source, known], **quietly)
    gr.api(generate, api_name='generate', **in_turn)
page.queue(max_size=queue_size, api_open=False)  # no call goes around the queue
# Gradio keeps the messages of 2,000 sessions, but the names of all, which callers choose, and facts about
# 10,000 texts. A forgotten session must count as empty, because a KeyError ends its queue or hangs a page.
events = gr.utils.LRUCache(2000)
page._queue.pending_event_ids_session, page._queue.ANALYTICS_MAX_EVENTS = events, 100
gr.utils.LRUCache.__missing__ = lambda cache, session: set() if cache is events else asyncio.Queue()

if __name__ == '__main__':
    if model_files():  # read one on the last thread made, so that the first visitor need not wait
        thread.submit(get_model, '').result()
    theme = gr.themes.Soft(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace']).set(
        body_text_color_subdued='*neutral_600')
    # text in the theme's own indigo, or on it, has less contrast than WCAG's AA asks for, 4.5 to 1
    theme.primary_400, theme.primary_500 = theme.primary_600, theme.primary_700
    try:
        page.launch(server_name=host or None, server_port=port if 'port' in given else None, share=share,
                    auth=tuple(login.split(':', 1)) if login else None, theme=theme, css=CSS,
                    footer_links=['api'], show_error=True, max_file_size=1, ssr_mode=False,
                    # limited, because a request stays in memory; JSON may need 12 bytes for a character
                    app_kwargs=dict(max_body_size=12 * max_prompt + 20_000), state_session_capacity=256,
                    _frontend=False)  # else Gradio gives up where its page takes three seconds to answer
    except SystemExit as leaving:  # after a signal; a slow exit would abort if a text is in progress
        for tunnel in gr.tunneling.CURRENT_TUNNELS:  # of --share
            tunnel.kill()
        os._exit(leaving.code)
