"""
The tests: against Hugging Face, tiktoken, torch and uninterrupted runs rather than against ourselves.

$ python -m pytest -q
"""
import ast
import asyncio
import contextlib
import csv
import dataclasses
import functools
import gc
import gzip
import hashlib
import http.server
import importlib.metadata
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import urllib.parse
import urllib.request
import warnings

import numpy as np
import pytest
import tiktoken
import torch
from torch.nn import functional as F

import config
import model
import train
from model import (GPT, GPTConfig, HeadLoss, Int4Linear, Int8Linear, build, choose, filter_logits, find, load,
                   read, save, split_loss)
from prepare import (CharTokenizer, FolderLock, TextStream, bits_per_nat, check_data, cut_exactly,
                     get_tokenizer, learn_tokenizer, load_data, prepare, replacing_files, stream_texts)
from quantize import convert, write_hugging_face

HERE = os.path.dirname(os.path.abspath(__file__))
CORPUS = os.path.join(HERE, 'input.txt')
PRESETS = sorted(name for name in os.listdir(f'{HERE}/config') if name.endswith('.py') and name[0] != '_')
GPT2 = {'name': 'gpt2', 'vocab_size': 50257}
SMALL = dict(block_size=64, vocab_size=1100, n_layer=2, n_head=2, n_embd=32)
WIDE = dict(block_size=96, n_layer=2, n_head=4, n_embd=64)  # with GPT-2's vocabulary
TINY_MODEL = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16']
TINY_RUN = [*TINY_MODEL, '--tokenizer=char', '--dataset=tiny', '--batch_size=4', '--dtype=float32',
            '--max_iters=20', '--log_interval=5', '--eval_interval=10', '--eval_iters=2',
            '--checkpoint_interval=5', '--sample_interval=0']
torch.set_num_threads(1)  # two would gain nothing in such small models, and much is lost on a busy machine


# -- helpers: scripts ----------------------------------------------------------------------------------------

@contextlib.contextmanager
def kept(owner, *names):
    """Restore these attributes afterwards."""
    values = [getattr(owner, name) for name in names]
    try:
        yield
    finally:
        for name, value in zip(names, values):
            setattr(owner, name, value)


@contextlib.contextmanager
def tracing():
    """A function that gives the most bytes that Python and NumPy have allocated since."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def run(script, *args, cwd, stdin=''):
    """Run a script inside this process, which saves importing torch; returncode, stdout and stderr."""
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE
    handlers, before, status = {number: signal.getsignal(number) for number in signals}, os.getcwd(), 0
    streams = [io.TextIOWrapper(io.BytesIO(text.encode()), encoding='utf-8', newline='')
               for text in (stdin, '', '')]
    with kept(sys, 'argv', 'stdin', 'stdout', 'stderr', 'excepthook'):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have set it to be ignored
        os.chdir(cwd)
        sys.argv, (sys.stdin, sys.stdout, sys.stderr) = [script, *map(str, args)], streams
        try:
            runpy.run_path(os.path.join(HERE, script), run_name='__main__')
        except SystemExit as leaving:
            status = leaving.code or 0
        except BaseException:
            status = 1
            sys.excepthook(*sys.exc_info())
        finally:
            os.chdir(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            torch.use_deterministic_algorithms(False)
    gc.collect()  # frees what would end with a process: the lock on its folder
    for stream in streams[1:]:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(errors='replace') for stream in streams[1:])
    return types.SimpleNamespace(returncode=status, stdout=out, stderr=err)


def done(process):
    """The finished process, which must have succeeded."""
    assert process.returncode == 0, process.stderr
    return process


def tiny_run(folder, out, *args):
    """A finished run of TINY_RUN with further settings, in out/<out>."""
    return done(run('train.py', *TINY_RUN, f'--out_dir=out/{out}', *args, cwd=folder))


def start(command, cwd, environment=(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE):
    """Start Python with these arguments, in a process of its own, of one thread."""
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1', 'OMP_NUM_THREADS': '1', **dict(environment)}
    return subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment, text=True, encoding='utf-8',
                            stdin=stdin, stdout=subprocess.PIPE, stderr=stderr)


def spawn(script, *args, cwd, **more):
    """Start a script as a user does."""
    return start([os.path.join(HERE, script), *args], cwd, **more)


def torchrun(ranks, *args, cwd, restarts=0):
    """Start train.py with several ranks."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}',
                f'--max-restarts={restarts}']
    return start([*launcher, os.path.join(HERE, 'train.py'), *args], cwd)


def ended(process, timeout=200, stdin=None):
    """(exit status, stdout, stderr) of a started process, once it has ended."""
    out, err = process.communicate(stdin, timeout=timeout)
    return process.returncode, out, err


def wait_for_step(process, step):
    """Read a training's output up to the line of this step, or of a later one."""
    for line in process.stdout:
        if line.startswith('step ') and int(line.split()[1].split('/')[0].replace(',', '')) >= step:
            return
    raise AssertionError(process.stderr.read())


def one_line(process, status, *words):
    """Check a refusal: this exit status, and one line on stderr that holds these words."""
    lines = [line for line in process.stderr.strip().splitlines() if 'parameters, step' not in line]
    assert process.returncode == status, process.stderr
    assert len(lines) == 1 and all(word in lines[0] for word in words), process.stderr


# -- helpers: files ------------------------------------------------------------------------------------------

def training_tokens(folder, dataset):
    """How many training tokens data/<dataset>/ has in a folder."""
    return os.path.getsize(folder / 'data' / dataset / 'train.bin') // 2


def log_of(out):
    """The rows of a run's log.csv, without the timings."""
    with open(out / 'log.csv', encoding='utf-8', newline='') as f:
        rows = list(csv.DictReader(f))
    columns = 'step', 'loss', 'grad_norm', 'lr', 'train_loss', 'val_loss', 'val_bpb'
    return [{key: row[key] for key in columns} for row in rows]


def same_run(a, b):
    """Check that two runs have the same weights, optimizers, state and log, bit for bit, timings aside."""
    one, two = read(a / 'ckpt.pt'), read(b / 'ckpt.pt')
    assert log_of(a) == log_of(b)
    assert one['model'].keys() == two['model'].keys()
    assert all(torch.equal(one['model'][name], two['model'][name]) for name in one['model'])
    for ours, others in zip(one['optimizers'], two['optimizers'], strict=True):
        for i, moments in ours['state'].items():
            assert all(torch.equal(moments[name], others['state'][i][name]) for name in moments)
    for key in one['state'].keys() - {'seconds', 'log_bytes'}:
        assert one['state'][key] == two['state'][key], key


def save_gpt(path, gpt, tokenizer=GPT2, step=1, **facts):
    """Save a model, with what its file must say."""
    facts.setdefault('trained_context', gpt.trained_context)
    save(path, gpt.config, gpt.state_dict(), tokenizer, step=step, **facts)


def contents_of(folder):
    """{name: bytes} of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- helpers: models and texts -------------------------------------------------------------------------------

def ids_of(steps):
    """The ids (B, T) that generate() yields."""
    return torch.stack(list(steps), dim=1)


def error_of(ours, exact):
    """The relative root mean square error."""
    return ((ours - exact).square().mean() / exact.square().mean()).sqrt()


def quantized_layer(kind, w, bias):
    """A layer of int8 or int4 with float weights w (O, C), packed into it."""
    O, C = w.shape
    layer = {'int8': Int8Linear, 'int4': Int4Linear}[kind](C, O, bias is not None)
    layer.weight, scale = layer.from_float(w)
    layer.scale, layer.bias = scale.float(), bias
    return layer


# the rows of the table of kernels that this chip can run: int_mm overflows without VNNI
CHIPS = [chip for chip, kernels in model.KERNELS.items() if 'int_mm' not in kernels or model.CHIP == chip]


def use_kernels(chip, monkeypatch):
    """Multiply as on a chip of this row of the table, small matrices too."""
    monkeypatch.setattr(model, 'SMALL_MATRIX', 0)
    for name, kernel in zip(('MANY_ROWS', 'ONE_ROW', 'INT8', 'INT4'), model.KERNELS[chip]):
        monkeypatch.setattr(model, name, kernel)


def hugging_face(gpt):
    """Hugging Face's GPT-2 with our weights."""
    transformers = pytest.importorskip('transformers', reason='pip install transformers')
    c = gpt.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head)).eval()
    weights = {f'transformer.{name}': p.t() if re.search(r'c_\w+\.weight', name) else p  # their Conv1D's
               for name, p in gpt.state_dict().items()}
    table = weights['transformer.wte.weight'][:c.vocab_size]
    theirs.load_state_dict({**weights, 'transformer.wte.weight': table, 'lm_head.weight': table})
    return theirs


def save_hugging_face(folder, **changes):
    """Save a random GPT-2 of Hugging Face's in a folder; return it."""
    transformers = pytest.importorskip('transformers', reason='pip install transformers')
    torch.manual_seed(3)
    shape = dict(n_positions=96, n_embd=64, n_layer=2, n_head=4, initializer_range=0.1)
    made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **changes})).eval()
    for name, p in made.named_parameters():
        if name.endswith('bias'):
            torch.nn.init.normal_(p, std=0.1)
    made.save_pretrained(folder)
    return made


def same_network(ours, theirs, idx):
    """Check that two models have the same logits, and the same greedy text."""
    with torch.no_grad():
        assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-4
    text = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=25, do_sample=False,
                           pad_token_id=0, eos_token_id=None)
    assert torch.equal(ids_of(ours.generate(idx, 25, temperature=0)), text[:, idx.size(1):])


def nanogpt(**shape):
    """(A checkpoint as nanoGPT saves it from a compiled model, that model)."""
    torch.manual_seed(5)
    made = GPT(GPTConfig(**{**WIDE, **shape})).eval()
    weights = {f'_orig_mod.transformer.{name}': w for name, w in made.state_dict().items()}
    weights['_orig_mod.lm_head.weight'] = weights['_orig_mod.transformer.wte.weight']
    weights['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 96, 96)  # its mask
    arguments = dict(WIDE, bias=made.config.bias, vocab_size=len(made.wte.weight), dropout=0.1)
    return dict(model=weights, optimizer={'state': {}}, model_args=arguments, iter_num=30,
                best_val_loss=torch.tensor(2.5), config={'dataset': 'shakespeare'}), made


def random_text(rng, length):
    """Text of letters, blanks, digits, accents, emoji and control characters."""
    alphabets = ['abc THE the ', ' \n\t', "'s't1290!?<|endoftext|>", 'éß日本語한국', '🎭👩‍👩‍👧',
                 '\x00\x1c\x1f\x85\xa0\u2028\u3000']
    return ''.join(rng.choice(rng.choice(alphabets)) * rng.choice((1, 1, 1, 5)) for _ in range(length))


class Bytes:
    """A tokenizer whose ids are bytes, and 256 the document end."""
    eot = 256

    def decode_bytes(self, ids):
        return bytes(ids)


# -- helpers: the Hub ----------------------------------------------------------------------------------------

class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers what huggingface_hub's snapshot_download() asks of the Hub, from the folders of a Hub."""

    def do_GET(self):
        hub, path = self.server, urllib.parse.unquote(self.path.partition('?')[0])
        asked = re.fullmatch(r'/(?:api/\w+/)?(.+?)/(revision|tree|resolve)/\w+/?(.*)', path)
        id, what, name = asked.groups() if asked else ('', '', '')
        status, body = hub.refusals.get(id, 200 if id in hub.folders else 404), b''
        if status in (401, 403) and what != 'resolve':
            status = 200  # anyone may list a gated repository
        if status == 200:
            files = contents_of(hub.folders[id])
            listed = [dict(type='file', path=name, size=len(file), oid=hashlib.sha1(file).hexdigest())
                      for name, file in files.items()]
            answers = dict(revision={'id': id, 'sha': '1' * 40, 'siblings': []}, tree=listed)
            body = files[name] if what == 'resolve' else json.dumps(answers[what]).encode()
        self.send_response(status)
        self.send_header('ETag', f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header('X-Repo-Commit', '1' * 40)
        reasons = {401: 'GatedRepo', 403: 'GatedRepo', 404: 'RepoNotFound'}
        self.send_header('X-Error-Code', reasons.get(status, ''))
        self.send_header('Content-Length', len(body))
        self.end_headers()
        if self.command == 'GET' and what == 'resolve' and id in hub.cut:
            body, hub.refusals[id] = body[:len(body) // 2], 503  # the connection breaks, and so do all others
        if self.command == 'GET':
            with contextlib.suppress(ConnectionError):  # the client may be gone
                self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


class Hub(http.server.ThreadingHTTPServer):
    """A stand-in of the Hub: {id: folder}, refusals {id: HTTP status}, and the ids whose files it cuts."""

    def __init__(self, folders, handler=HubHandler):
        super().__init__(('127.0.0.1', 0), handler)
        self.folders, self.refusals, self.cut = folders, {}, set()
        self.address = f'http://127.0.0.1:{self.server_port}'
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        """Refuse every connection from now on."""
        self.shutdown()
        self.server_close()


# -- helpers: the page ---------------------------------------------------------------------------------------

def serve(checkpoint, *args, cwd):
    """(A started app.py, its address)."""
    process = spawn('app.py', f'--checkpoint={checkpoint}', *args, cwd=cwd, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if 'http://' in line:
            return process, line.split()[-1].rstrip('/')
    raise AssertionError('app.py did not start')


@contextlib.contextmanager
def browser_on(page):
    """(Chromium's view of the page, the errors on its console, the addresses it asked for)."""
    playwright = pytest.importorskip('playwright.sync_api', reason='pip install playwright')
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not chromium:
        pytest.skip('no Chromium on this machine')
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=[
            '--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        view = browser.new_page(viewport={'width': 1280, 'height': 900})
        view.set_default_timeout(100_000)  # milliseconds: other tests may share the cores
        errors, requests = [], []
        view.on('console', lambda message: errors.append(message.text) if message.type == 'error' else None)
        view.on('pageerror', lambda error: errors.append(str(error)))
        view.on('request', lambda request: requests.append(request.url))
        view.goto(page)
        view.wait_for_function("document.querySelector('#about')?.innerText.includes('parameters')")
        yield view, errors, requests
        browser.close()


# -- fixtures ------------------------------------------------------------------------------------------------

@pytest.fixture
def gpt():
    """A small random GPT."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL)).eval()


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """A folder with a small text, and a tiny model trained on it in out/tiny."""
    path = tmp_path_factory.mktemp('user')
    (path / 'input.txt').write_text('The cat sat on the mat; é 日本 🎭.\n' * 60, encoding='utf-8')
    status, out, error = ended(spawn('train.py', *TINY_RUN, '--out_dir=out/tiny', cwd=path))
    assert status == 0, error
    (path / 'stdout.txt').write_text(out, encoding='utf-8')
    return path


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A Hub on this machine that holds the tiny model as me/folio, and an empty cache."""
    constants = pytest.importorskip('huggingface_hub.constants', reason='pip install gradio')
    server = Hub({'me/folio': folder / 'out/tiny'})
    url = server.address + '/{repo_id}/resolve/{revision}/{filename}'
    for name, value in dict(ENDPOINT=server.address, HUGGINGFACE_CO_URL_TEMPLATE=url, HF_HUB_OFFLINE=False,
                            HF_HUB_CACHE=str(tmp_path / 'cache')).items():
        monkeypatch.setattr(constants, name, value)
    yield server
    server.close()


@pytest.fixture(scope='session')
def reference(tmp_path_factory):
    """tiktoken's own r50k_base, which is GPT-2's vocabulary; it checks the hash of our file in its cache."""
    cache = tmp_path_factory.mktemp('tiktoken')
    url = 'https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken'
    shutil.copy(os.path.join(HERE, 'data', 'gpt2.tiktoken'), cache / hashlib.sha1(url.encode()).hexdigest())
    os.environ['TIKTOKEN_CACHE_DIR'] = str(cache)
    return tiktoken.get_encoding('r50k_base')


@pytest.fixture(scope='session')
def page(folder):
    """The address of a running app.py with the tiny model, a copy of it in served/."""
    pytest.importorskip('gradio_client', reason='pip install gradio')
    shutil.copytree(folder / 'out/tiny', folder / 'served')
    process, address = serve('served', '--max_prompt=500', '--queue_size=4', '--max_tokens=15000', cwd=folder)
    yield address
    process.terminate()
    status, rest, _ = ended(process, 30)
    assert status == 143 and 'Traceback' not in rest, rest


@pytest.fixture
def app(folder, monkeypatch):
    """app.py's names, imported in the tiny model's folder."""
    pytest.importorskip('gradio', reason='pip install gradio')
    monkeypatch.setattr(sys, 'argv', ['app.py', '--checkpoint=out/tiny'])
    monkeypatch.chdir(folder)
    return runpy.run_path(os.path.join(HERE, 'app.py'))


# -- model.py: the network -----------------------------------------------------------------------------------

@pytest.mark.parametrize('shape', [SMALL, dict(vocab_size=50257, n_layer=2)], ids=['small', 'gpt2-wide'])
def test_gpt_equals_hugging_face(shape):
    torch.manual_seed(1)
    gpt = GPT(GPTConfig(**shape)).eval()
    for p in gpt.parameters():  # biases and norms too must matter
        p.data += 0.05 * torch.randn_like(p)
    theirs, idx = hugging_face(gpt), torch.randint(gpt.config.vocab_size, (2, 33))
    same_network(gpt, theirs, idx)
    with torch.no_grad():
        logits = gpt(idx)
        assert logits.shape == (2, 33, gpt.config.vocab_size)
        assert abs(gpt(idx, idx) - F.cross_entropy(logits.flatten(0, 1), idx.flatten())) < 1e-5


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_gpt_sees_no_later_token(gpt, dtype):
    """In either type: bfloat16 on a CPU has an attention of its own."""
    idx = torch.randint(1100, (1, 20))
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 1100
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        difference = (gpt(idx) - gpt(changed)).abs().amax(dim=(0, 2))
    assert difference[:10].max() == 0 and difference[10:].min() > 0


def test_gpt_has_the_same_loss_in_bfloat16(gpt):
    idx, losses = torch.randint(1100, (2, 33)), []
    gpt.train()
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            losses.append(gpt(idx[:, :-1], idx[:, 1:]))
    assert abs(losses[0] - losses[1]) < 0.01


@pytest.mark.parametrize('shape', [dict(n_layer=2), dict(SMALL, vocab_size=65), dict(SMALL, bias=False)],
                         ids=['50257', '65', 'no bias'])
def test_gpt_starts_at_a_loss_of_ln_v(shape):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**shape))
    V, C = gpt.config.vocab_size, gpt.config.n_embd
    idx = torch.randint(V, (4, 65))
    assert abs(gpt(idx[:, :-1], idx[:, 1:]).item() - math.log(V) - 0.0002 * C) < 0.1


@pytest.mark.parametrize('shape', [dict(), dict(SMALL, bias=False), dict(SMALL, vocab_size=65)], ids=str)
def test_gpt_counts_its_parameters(shape):
    with torch.device('meta'):
        gpt = GPT(GPTConfig(**shape))
    padding = (len(gpt.wte.weight) - gpt.config.vocab_size) * gpt.config.n_embd
    assert gpt.num_params() == sum(p.numel() for p in gpt.parameters()) - padding
    if not shape:
        assert gpt.num_params() == 124_439_808 and gpt.wte.weight.shape == (50304, 768)
        assert gpt.flops_per_token(1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


def test_gpt_starts_residual_projections_smaller():
    torch.manual_seed(0)
    weights = GPT(GPTConfig(n_layer=3, n_embd=192, n_head=3, vocab_size=100)).state_dict()
    assert abs(weights['h.1.mlp.c_fc.weight'].std() / 0.02 - 1) < 0.05
    assert abs(weights['h.1.mlp.c_proj.weight'].std() / (0.02 / math.sqrt(6)) - 1) < 0.05
    assert not weights['h.1.attn.c_attn.bias'].any()


def test_gpt_param_groups_are_disjoint_and_complete(gpt):
    gpt.extra = torch.nn.Linear(2, 2)
    groups = gpt.param_groups(0.1)
    ids = [id(p) for group in groups for p in group['params']]
    assert len(ids) == len(set(ids)) == len(list(gpt.parameters()))
    assert [group['weight_decay'] for group in groups] == [0.1, 0.1, 0.0]
    for group in groups:  # matrices decay, biases and norms do not
        assert all(p.dim() == (2 if group['weight_decay'] else 1) for p in group['params'])
    assert all(any(p is q for q in gpt.h.parameters()) for p in groups[0]['params'])


def test_gpt_learns_one_batch_by_heart(gpt):
    idx = torch.randint(1100, (4, 17))
    optimizer = torch.optim.AdamW(gpt.param_groups(0.0), lr=3e-3)
    gpt.train()
    for _ in range(150):
        loss = gpt(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_gpt_compiles_into_one_graph(gpt):
    """For a user of model.py, without gradients and with them; fullgraph raises where the graph breaks."""
    idx, gradients = torch.randint(1100, (2, 9)), []
    compiled = torch.compile(gpt, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(idx), gpt(idx), atol=1e-5)
    gpt.train()
    for one in (gpt, compiled):
        one(idx, idx).backward()
        gradients.append([p.grad for p in gpt.parameters()])
        gpt.zero_grad(set_to_none=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


def test_gpt_compiles_its_blocks_into_one_graph(gpt):
    idx, graphs, gradients = torch.randint(1100, (2, 9)), [], []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph
    gpt.train()
    for compiled in (False, True):
        if compiled:
            gpt.compile(backend=counting, fullgraph=True)
        gpt(idx, idx).backward()
        gradients.append([p.grad for p in gpt.parameters()])
        gpt.zero_grad(set_to_none=True)
    gpt.compile(disable=True)
    assert len(gpt.h) > 1 and len(graphs) == 2  # a block, the loss
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


@pytest.mark.parametrize('kind', ['head', 'next_logits'])
def test_gpt_in_bfloat16_has_float32_logits(gpt, kind):
    """Near -100, as GPT-2's are, bfloat16 numbers are 0.5 apart."""
    gpt.bfloat16()
    with torch.no_grad():
        gpt.wte.weight[:, 0], gpt.ln_f.weight[0], gpt.ln_f.bias[0] = -1, 0, 100
        idx = torch.randint(1100, (2, 9))
        logits = gpt(idx)[:, -1] if kind == 'head' else gpt.next_logits(idx, gpt.new_cache(2, 9)[0])[:, 0]
        exact = gpt.hidden(idx)[:, -1].double() @ gpt.wte.weight[:1100].t().double()
    assert logits.dtype == torch.float32 and exact.mean() < -90 and (logits - exact).abs().max() < 1e-3


@pytest.mark.parametrize('texts, compiled', [(3, False), (1, True), (3, True)])
def test_gpt_steps_with_static_shapes_as_without(gpt, texts, compiled):
    """What a CUDA graph captures: the position is a tensor, and all of the cache is read behind a mask."""
    idx, caches = torch.randint(1100, (texts, 12)), [gpt.new_cache(texts, 32)[0] for _ in range(2)]
    for cache in caches:
        gpt.next_logits(idx[:, :7], cache)
    gpt.compiled_steps = compiled
    if compiled:
        gpt.compile(backend='eager', fullgraph=True)
    for position in range(7, 12):
        fixed, plain = (gpt.next_logits(idx[:, position:position + 1], cache, start)
                        for cache, start in zip(caches, (torch.tensor([position]), position)))
        assert torch.allclose(fixed, plain, atol=1e-5)
    gpt.compile(disable=True)


def test_compiled_attention_of_one_position_equals_attention():
    q, k, v = (torch.randn(2, 3, T, 16) for T in (1, 9, 9))
    mask = torch.zeros(1, 9).masked_fill(torch.arange(9) > 6, -math.inf)
    compiled = torch.compile(model.attend_in_products, backend='eager', fullgraph=True)
    exact = F.scaled_dot_product_attention(q, k[:, :, :7], v[:, :, :7])
    for attend in (compiled, model.attend_in_products):
        assert torch.allclose(attend(q, k, v, 0.0, mask), exact, atol=1e-5)


def test_gpt_generates_without_cudnns_attention(gpt, monkeypatch):
    seen, attend = [], F.scaled_dot_product_attention

    def spy(*args, **options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **options)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    gpt.next_logits(torch.zeros(1, 1, dtype=torch.long), gpt.new_cache(1, 4)[0])
    gpt(torch.zeros(1, 1, dtype=torch.long))
    assert seen == [False, False, True, True]  # two layers


@pytest.mark.parametrize('chip', CHIPS)
@pytest.mark.parametrize('shape', [(5, 64), (2, 3, 64), (1, 64), (100, 64)], ids=str)
@pytest.mark.parametrize('bias', [True, False])
def test_product_and_its_gradients_equal_torchs(chip, shape, bias, monkeypatch):
    use_kernels(chip, monkeypatch)
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(96, 64), *[torch.randn(96)] * bias]  # x, weight, bias
    grad, results = torch.randn(*shape[:-1], 96), []
    for f in (model.product, F.linear):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = f(*leaves)
        y.backward(grad)
        results.append([y, *(t.grad for t in leaves)])
    assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(*results))
    with torch.no_grad():  # without gradients it takes another way
        assert torch.allclose(model.product(*inputs), results[1][0], atol=1e-4)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_head_loss_equals_cross_entropy(dtype, tolerance):
    """Loss and gradients, over more rows than one chunk holds."""
    torch.manual_seed(0)
    N, V, C = 700, 50304, 16
    x, table = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    targets, results = torch.randint(V, (N,)), []
    for loss_of in (HeadLoss.apply, lambda x, table, targets: F.cross_entropy(x @ table.t(), targets)):
        x.grad = table.grad = None
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = 3 * loss_of(x, table, targets)
        loss.backward()
        results.append((loss.detach(), x.grad, table.grad))
    for ours, theirs in zip(*results):
        assert (ours - theirs).norm() / theirs.norm() < tolerance


def test_loss_of_an_id_without_a_probability_is_finite():
    losses, grad = model.loss_of_logits(torch.tensor([[0.0, 200.0]]), torch.tensor([[0]]), torch.float32)
    assert 87 < losses.item() < 88 and grad.tolist() == [[-1, 1]]


@pytest.mark.parametrize('wrong', [dict(n_head=5), dict(n_layer=0), dict(dropout=1.0), dict(vocab_size=-3)],
                         ids=str)
def test_gpt_config_refuses_impossible_shapes(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong)))):
        GPTConfig(**{**SMALL, **wrong})


@pytest.mark.parametrize('name, rank, index', [
    ('auto', '', 0),
    ('auto', '1', 1),
    ('cuda', '', 0),
    ('cuda', '1', 1),
    ('cuda:1', '', 1)])
def test_pick_device_names_a_gpu_that_torch_takes(name, rank, index, monkeypatch):
    """As torch itself reads the name, and by no call that opens a context."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    if rank:
        monkeypatch.setenv('LOCAL_RANK', rank)
    assert torch.cuda._utils._get_device_index(model.pick_device(name)) == index
    for wrong in ('cuda:2', 'cuda:x', 'tpu', 'meta', 'cpu:0'):
        with pytest.raises(ValueError, match=wrong):
            model.pick_device(wrong)


@pytest.mark.parametrize('capability, dtype', [((6, 1), torch.float32), ((7, 5), torch.float16),
                                               ((8, 9), torch.bfloat16), ((9, 0), torch.bfloat16)], ids=str)
def test_pick_dtype_takes_what_a_gpu_has_units_for(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert model.pick_dtype('cuda:0') == dtype
    assert model.pick_dtype('cuda:0', 'float32') == torch.float32


# -- model.py: generation ------------------------------------------------------------------------------------

@pytest.mark.parametrize('length, B, compile', [
    (1, 1, 'False'),
    (7, 3, 'False'),
    (15, 1, 'False'),
    (16, 3, 'False'),
    (40, 1, 'False'),
    (7, 1, 'True'),
    (5, 3, 'True')])
def test_generate_with_a_cache_equals_whole_passes(gpt, monkeypatch, length, B, compile):
    """Within the window, and where it slides and keeps its newest half."""
    gpt.trained_context = 16
    idx, seen = torch.randint(1100, (B, length)), []
    window = idx[:, -16:]

    def spy(logits, *rest):
        seen.append(logits.clone())
        return choose(logits, *rest)
    monkeypatch.setattr(model, 'choose', spy)
    for ids in gpt.generate(idx, 40, temperature=0, compile=compile):
        if window.size(1) > 16:
            window = window[:, -8:]
        with torch.no_grad():
            logits = gpt(window)[:, -1]
        assert torch.equal(ids, logits.argmax(dim=-1)) and (logits - seen.pop()).abs().max() < 1e-4
        window = torch.cat((window, ids[:, None]), dim=1)


@pytest.mark.parametrize('B', [1, 4])
def test_generate_equals_hugging_faces_greedy_text(B):
    torch.manual_seed(1)
    gpt = GPT(GPTConfig(**{**SMALL, 'block_size': 256})).eval()
    for p in gpt.parameters():
        p.data *= 4  # logits far enough apart that the last bits do not decide
    theirs, idx = hugging_face(gpt), torch.randint(1100, (B, 9))
    with torch.no_grad():
        expected = theirs.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=200, do_sample=False,
            repetition_penalty=1.3, eos_token_id=None, pad_token_id=0)
    ours = ids_of(gpt.generate(idx, 200, temperature=0, repetition_penalty=1.3))
    assert torch.equal(ours, expected[:, 9:])


def test_generate_depends_on_the_seed_alone(gpt):
    idx = torch.randint(1100, (1, 5))
    batch = ids_of(gpt.generate(idx, 20, num_samples=3, seed=7))
    torch.rand(3)  # whatever else draws
    assert torch.equal(batch[1], ids_of(gpt.generate(idx, 20, seed=8))[0])
    assert not torch.equal(batch[0], batch[1])
    two = torch.cat((idx, idx.flip(1)))  # a prompt's texts are side by side
    assert torch.equal(ids_of(gpt.generate(two, 20, num_samples=3, seed=7))[:3], batch)


def test_generate_takes_any_setting(gpt):
    rng = random.Random(0)
    for _ in range(60):
        settings = dict(
            temperature=rng.choice([0.0, 1e-300, 0.8, 1e9]), top_k=rng.choice([0, 1, 50, 10**9]),
            top_p=rng.choice([0.0, 1e-9, 0.9, 1.0]), min_p=rng.choice([0.0, 1e-300, 0.1, 1.0]),
            repetition_penalty=rng.choice([1e-3, 1.0, 1.2, 1e3]), context=rng.choice([0, 1, 2, 33]),
            num_samples=rng.choice([1, 3]), seed=rng.choice([0, 2**63 - 3]))  # the third text's is 2**63 - 1
        prompt = torch.randint(1100, (1, rng.choice([1, 63, 64, 65, 500])))
        steps = list(gpt.generate(prompt, rng.choice([1, 2, 2, 2, 70]), **settings))
        assert all(0 <= ids.min() and ids.max() < 1100 for ids in steps), settings


def test_generate_with_drafts_writes_the_same_text(gpt):
    """Where all drafts are right, where one in twenty is wrong, across the window's slide, with penalties."""
    rng, written, passes = random.Random(0), 0, 0
    for p in gpt.parameters():
        p.data *= 3  # so that the text depends on what the model has read
    for _ in range(60):
        settings = dict(
            temperature=rng.choice([0.0, 0.8, 1.5]), top_k=rng.choice([0, 5, 50]),
            top_p=rng.choice([0.9, 1.0]), min_p=rng.choice([0.0, 0.1]),
            repetition_penalty=rng.choice([0.8, 1.0, 1.2]),
            context=rng.choice([0, 8, 33]), seed=rng.randrange(99), compile=rng.choice(['False', 'True']))
        prompt, steps = torch.randint(1100, (1, rng.choice([1, 30, 90]))), rng.choice([1, 2, 90])
        plain = ids_of(gpt.generate(prompt, steps, **settings))
        corpus = torch.cat((prompt, plain, prompt, prompt), dim=1)[0].numpy().astype('<u2')
        corpus[np.random.default_rng(0).random(len(corpus)) < rng.choice([0, 0.05])] = 7
        index = model.Index(corpus)
        assert torch.equal(ids_of(gpt.generate(prompt, steps, drafts=index, **settings)), plain)
        written, passes = written + steps, passes + index.passes
    assert written > 2 * passes


def test_generate_with_drafts_may_stop_inside_a_pass(gpt):
    prompt = torch.tensor([[5, 6, 7]])
    plain = ids_of(gpt.generate(prompt, 30, temperature=0))
    index = model.Index(torch.cat((prompt, plain), dim=1)[0].numpy().astype('<u2'))
    for stop in range(1, 15):
        steps = gpt.generate(prompt, 30, temperature=0, drafts=index)
        assert [next(steps).item() for _ in range(stop)] == plain[0, :stop].tolist()
        steps.close()
    assert torch.equal(ids_of(gpt.generate(prompt, 30, temperature=0, drafts=index)), plain)


def test_generate_without_a_match_runs_one_id_a_pass(gpt):
    index = model.Index(np.arange(500, dtype='<u2'))
    steps = gpt.generate(torch.tensor([[5, 3]]), 30, drafts=index, top_k=1)
    assert ids_of(steps).shape == (1, 30) and index.passes == 29  # and the prompt's pass


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_generate_with_drafts_takes_several_ids_a_pass_when_quantized(kind):
    torch.manual_seed(0)
    weights = GPT(GPTConfig(**SMALL)).state_dict()
    weights['wte.weight'] = weights['wte.weight'][:SMALL['vocab_size']]
    convert(weights, kind)
    gpt = build({'config': dict(SMALL, quantized=kind), 'trained_context': 64, 'model': weights})
    prompt = torch.tensor([[5, 6, 7]])
    plain = ids_of(gpt.generate(prompt, 60, temperature=0))
    index = model.Index(torch.cat((prompt, plain), dim=1)[0].numpy())  # int64 is fine too
    assert torch.equal(ids_of(gpt.generate(prompt, 60, temperature=0, drafts=index)), plain)
    assert index.passes < 30


def test_generate_with_drafts_refuses_ids_that_the_model_lacks(gpt):
    prompt = torch.tensor([[5, 6, 7, 8]])
    plain = ids_of(gpt.generate(prompt, 30, temperature=0))
    corpus = torch.cat((prompt, plain), dim=1)[0].numpy()
    corpus[14:] = 60000  # it is proposed after the tenth id
    assert torch.equal(ids_of(gpt.generate(prompt, 30, temperature=0, drafts=model.Index(corpus))), plain)


@pytest.mark.parametrize('compile', ['False', 'True'])
def test_generate_under_autocast(gpt, compile, capsys):
    with torch.autocast('cpu', torch.bfloat16):
        assert ids_of(gpt.generate(torch.tensor([[5, 6, 7]]), 70, compile=compile)).shape == (1, 70)
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('n', [4, 31, 32, 3000])
def test_index_finds_what_the_corpus_holds(n):
    rng = np.random.default_rng(n)
    corpus = rng.integers(0, 6, n).astype('<u2') * 10000  # five ids above 2**15 too
    index, runs = model.Index(corpus), {tuple(corpus[i:i + 8]) for i in range(n - 7)}
    for run in [*runs][:200]:
        assert index.holds(run)
    for run in rng.integers(0, 6, (200, 8)).astype('<u2') * 10000:
        assert index.holds(run) == (tuple(run) in runs)
    for start in rng.integers(0, n, 20) if n > 100 else ():
        draft = index.propose(torch.tensor(corpus[start:start + 12].astype('int64')), 5)
        assert start + 12 >= n or draft == corpus[start + 12:start + 17].tolist()


def test_generate_never_samples_padded_ids(gpt):
    with torch.no_grad():
        gpt.wte.weight[1100:] = 100 * gpt.wte.weight[:1].sign()  # rows 1100 to 1151 are padding
    assert gpt.config.padded_vocab_size == 1152
    steps = gpt.generate(torch.zeros(8, 1, dtype=torch.long), 60, temperature=9.0)
    assert all(ids.max() < 1100 for ids in steps)


def test_generate_leaves_train_mode_and_has_no_dropout():
    torch.manual_seed(0)
    gpt, idx = GPT(GPTConfig(**SMALL, dropout=0.5)).train(), torch.tensor([[1, 2, 3]])
    ours = ids_of(gpt.generate(idx, 30, temperature=0))
    assert gpt.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert torch.equal(ours, ids_of(gpt.eval().generate(idx, 30, temperature=0)))


def test_choose_follows_the_distribution():
    torch.manual_seed(0)
    logits, uniform = torch.tensor([[0.0, 3.0, 2.0, -1.0]]).expand(4000, 4), torch.rand(4000)
    assert (choose(logits, uniform, temperature=0) == 1).all()
    assert set(choose(logits, uniform, 5.0, top_k=2).tolist()) == {1, 2}
    assert (choose(logits, uniform, 1e-300) == 1).all()  # no overflow to nan
    assert (choose(logits, uniform, top_p=0.0) == 1).all()
    counts = torch.bincount(choose(logits, uniform, 2.0), minlength=4)
    assert (counts / 4000 - torch.softmax(logits[0] / 2, 0)).abs().max() < 0.03
    edge = torch.tensor([1 - 2**-24, 0.0])  # the greatest and least numbers that torch.rand gives
    assert choose(torch.tensor([[0.0, -math.inf, 0.0, -math.inf]] * 2), edge).tolist() == [2, 0]


@pytest.mark.parametrize('top_p, kept', [
    (0.0, 1), (0.45, 1), (0.55, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)])
def test_filter_logits_keeps_the_fewest_that_reach_top_p(top_p, kept):
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()  # by rank: 0.5, 0.8, 0.95 and 1 in all
    finite = filter_logits(logits, top_p=top_p)[0][0].isfinite()
    assert finite.nonzero().flatten().tolist() == sorted([1, 3, 0, 2][:kept])


@pytest.mark.parametrize('settings', [
    dict(temperature=0.7),
    dict(top_k=50),
    dict(top_k=1),
    dict(top_p=0.9),
    dict(top_p=0.0),
    dict(min_p=0.05),
    dict(min_p=1.0),
    dict(repetition_penalty=1.3),
    dict(temperature=2.0, top_k=300, top_p=0.8, min_p=0.01, repetition_penalty=0.8)], ids=str)
def test_choose_filters_logits_as_hugging_face(settings, monkeypatch):
    theirs = pytest.importorskip('transformers.generation.logits_process', reason='pip install transformers')
    torch.manual_seed(0)
    logits, idx = 3 * torch.randn(16, 1100), torch.randint(1100, (16, 40))
    penalty, temperature = settings.get('repetition_penalty', 1.0), settings.get('temperature', 1.0)
    seen, filtered = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, idx, True), []

    def spy(*args):
        filtered.append(filter_logits(*args))
        return filtered[-1]
    monkeypatch.setattr(model, 'filter_logits', spy)
    choose(logits, torch.rand(16), **settings, seen=seen)
    (ours, ids), = filtered
    if ids is not None:
        ours = torch.full_like(logits, -math.inf).scatter(1, ids, ours)
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(idx, logits)
    expected = theirs.TemperatureLogitsWarper(temperature)(idx, expected)
    for key, warper in (('top_k', theirs.TopKLogitsWarper), ('top_p', theirs.TopPLogitsWarper),
                        ('min_p', theirs.MinPLogitsWarper)):
        if key in settings:
            expected = warper(settings[key])(idx, expected)
    assert (ours.softmax(dim=-1) - expected.softmax(dim=-1)).abs().max() < 1e-5


def test_split_loss_is_the_mean_over_every_token(gpt):
    """The short window at the end included."""
    tokens = np.random.default_rng(0).integers(0, 1100, 103).astype(np.uint16)
    ids, total = torch.from_numpy(tokens.astype(np.int64)), 0.0
    for i in range(0, 102, 16):
        x, y = ids[i:i + 16][:102 - i], ids[i + 1:i + 17]
        with torch.no_grad():
            total += F.cross_entropy(gpt(x[None])[0], y, reduction='sum').item()
    assert abs(split_loss(gpt, tokens, 16, batch_tokens=32) - total / 102) < 1e-5
    with torch.no_grad():
        less_than_a_window = gpt(ids[None, :5], ids[None, 1:6]).item()
    assert abs(split_loss(gpt, tokens, 32, max_tokens=6) - less_than_a_window) < 1e-5
    with pytest.raises(ValueError, match='at least 2'):
        split_loss(gpt, tokens[:1], 16)


# -- model.py: quantized layers ------------------------------------------------------------------------------

@pytest.mark.parametrize('chip', CHIPS)
@pytest.mark.parametrize('kind, tolerance', [('int8', 0.01), ('int4', 0.101)])
@pytest.mark.parametrize('O, C', [(96, 64), (65, 33), (7, 100), (1, 1), (2304, 768)])
def test_quantized_layer_is_near_the_float_one(chip, kind, tolerance, O, C, monkeypatch):
    use_kernels(chip, monkeypatch)
    torch.manual_seed(0)
    w, bias = torch.randn(O, C), torch.randn(O)
    layer = quantized_layer(kind, w, bias)
    table = layer.rows(torch.arange(O))
    assert error_of(table, w) < tolerance
    packed = layer.pack()
    for x in (torch.randn(2, 1, C), torch.randn(2, 3, C), torch.randn(90, C)):
        assert error_of(packed(x), x @ table.t() + bias) < 0.025  # activations in 7 or 8 bits, or bfloat16
    assert packed(torch.zeros(1, 1, C)).isfinite().all()
    assert quantized_layer(kind, 0 * w, None).pack()(x).abs().max() == 0


@pytest.mark.parametrize('chip', CHIPS)
def test_int8_layer_gives_a_row_alone_what_it_gives_it_among_others(chip, monkeypatch):
    use_kernels(chip, monkeypatch)
    torch.manual_seed(0)
    layer, x = quantized_layer('int8', torch.randn(300, 256), torch.randn(300)).pack(), torch.randn(16, 256)
    x[3] *= 1000  # must not take the other rows' bits
    for row, among_others in zip(x, layer(x)):
        alone = layer(row[None])[0]
        assert error_of(alone, among_others) < 1e-6
        assert model.INT8 == 'float' or torch.equal(alone, among_others)


def test_int8_layer_has_a_fixed_layout():
    """Bytes and scales written by hand: files made before must load for ever."""
    floats = torch.tensor([[127, -127, 1, 0], [-63.5, 20, -0.5, 3]])
    weight = torch.tensor([[127, -127, 1, 0], [-127, 40, -1, 6]], dtype=torch.int8)
    ours, scale = Int8Linear.from_float(floats)
    assert torch.equal(ours, weight) and scale.tolist() == [1, 0.5]
    layer = Int8Linear(4, 2, bias=False)
    layer.load_state_dict({'weight': weight, 'scale': torch.tensor([1, 0.5])})
    assert torch.equal(layer.rows(torch.arange(2)), floats)


def test_int4_layer_has_a_fixed_layout():
    """Of the two numbers in a byte the even column is the low half; 8 is zero; a scale for 32 columns."""
    bytes_of_32 = [0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe] * 2
    weight = torch.tensor([bytes_of_32 * 2] * 2, dtype=torch.uint8)  # (2, 32)
    scale = torch.tensor([[1, 2], [0.5, 0.25]])
    floats = (torch.arange(-8.0, 8).repeat(2) * scale[..., None]).flatten(1)  # (2, 64)
    ours, our_scale = Int4Linear.from_float(floats)
    assert torch.equal(ours, weight) and torch.equal(our_scale.float(), scale)
    layer = Int4Linear(64, 2, bias=False)
    layer.load_state_dict({'weight': weight, 'scale': scale})
    assert torch.equal(layer.rows(), floats)
    assert torch.allclose(layer.pack()(torch.eye(64)), floats.t(), atol=0.07)  # exact, or in int8


def test_int8_layer_is_as_near_as_torchs_own():
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(512, 600), torch.randn(50, 512)
    quantize_dynamic = getattr(torch.ao.quantization, 'quantize_dynamic', None)
    if quantize_dynamic is None:
        pytest.skip('this torch has no torch.ao.quantization any more')
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='torch.ao.quantization is deprecated')
        warnings.filterwarnings('ignore', message='torch.quantize_per_tensor')
        theirs = quantize_dynamic(torch.nn.Sequential(plain), {torch.nn.Linear}, dtype=torch.qint8)(x)
    with torch.no_grad():
        ours, exact = quantized_layer('int8', plain.weight, plain.bias).pack()(x), plain(x)
    assert (ours - exact).square().mean() <= (theirs - exact).square().mean()


@pytest.mark.parametrize('kind, tolerance', [('int8', 0.035), ('int4', 0.2)])
@pytest.mark.parametrize('shape', [
    dict(SMALL, n_embd=128),
    dict(SMALL, bias=False),
    dict(SMALL, vocab_size=65, n_embd=36)], ids=['128 wide', 'no bias', '65 ids'])
def test_quantized_gpt_is_near_the_float_one(kind, tolerance, shape, monkeypatch):
    monkeypatch.setattr(model, 'SMALL_MATRIX', 0)
    torch.manual_seed(0)
    gpt, idx = GPT(GPTConfig(**shape)).eval(), torch.randint(65, (3, 40))
    with torch.no_grad():
        exact = gpt(idx)
    weights = {**gpt.state_dict(), 'wte.weight': gpt.wte.weight.detach()[:shape['vocab_size']]}
    convert(weights, kind)
    assert all(w.dtype.itemsize <= 2 for w in weights.values())
    small = build({'config': dict(shape, quantized=kind), 'trained_context': 64, 'model': weights})
    with torch.no_grad():
        assert error_of(small(idx), exact) < tolerance
    assert small.num_params() == gpt.num_params()
    assert len(list(small.generate(idx, 70, num_samples=2))) == 70


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_quantized_gpt_is_a_float_one_on_a_gpu(kind, capsys):
    """'cpu:0' stands for a GPU here: all but 'cpu' gets floats."""
    torch.manual_seed(0)
    weights, idx = GPT(GPTConfig(**SMALL)).state_dict(), torch.randint(1100, (2, 9))
    weights['wte.weight'] = weights['wte.weight'][:1100]
    convert(weights, kind)
    contents = {'config': dict(SMALL, quantized=kind), 'trained_context': 64}
    ours, floats = (build({**contents, 'model': dict(weights)}, device) for device in ('cpu', 'cpu:0'))
    assert not floats.config.quantized and 'floats again' in capsys.readouterr().err
    with torch.no_grad():
        assert error_of(ours(idx), floats(idx)) < 0.03


@pytest.mark.parametrize('chip', CHIPS)
@pytest.mark.parametrize('kind', ['', 'int8', 'int4'])
def test_trace_writes_what_single_calls_write(chip, kind, monkeypatch):
    """The same ids, for one text and for three, beyond the window too; one trace for each number of texts."""
    use_kernels(chip, monkeypatch)
    if not kind:
        monkeypatch.setattr(model, 'SMALL_MATRIX', 2**19)  # large float matrices are not traced
    torch.manual_seed(0)
    shape = dict(SMALL, n_embd=128, quantized=kind)
    weights = {**GPT(GPTConfig(**{**shape, 'quantized': ''})).state_dict()}
    weights['wte.weight'] = weights['wte.weight'][:shape['vocab_size']]
    if kind:
        convert(weights, kind)
    gpt = build({'config': shape, 'trained_context': 40, 'model': weights})
    for texts in (1, 3, 1):
        traced, plain = (ids_of(gpt.generate(torch.tensor([[5, 6]]), 70, num_samples=texts, compile=compile))
                         for compile in ('auto', 'False'))
        assert torch.equal(traced, plain)
    assert set(model.TRACES[gpt]) == {1, 3}


def test_trace_serves_every_window(gpt):
    """The smallest first: its cache of one position must not become a constant."""
    for context in (1, 2, 30):
        traced, plain = (ids_of(gpt.generate(torch.tensor([[5, 6]]), 20, context=context, compile=compile))
                         for compile in ('True', 'False'))
        assert torch.equal(traced, plain)


def test_trace_that_fails_leaves_single_calls(gpt, monkeypatch, capsys):
    monkeypatch.setattr(torch.jit, 'trace_module', lambda *args, **options: 1 / 0)
    assert ids_of(gpt.generate(torch.tensor([[5]]), 5, compile='True')).shape == (1, 5)
    assert 'division by zero' in capsys.readouterr().err


def capture_on_a_cpu(run, *inputs):
    """capture() as a test can have it: the same buffers, and an output that the next call overwrites."""
    output = run(*inputs).clone()

    def replay(*new):
        for buffer, values in zip(inputs, new, strict=True):
            buffer[...] = values
        return output.copy_(run(*inputs))
    return replay


@pytest.mark.parametrize('options', [
    {'temperature': 0}, {'top_k': 20}, {'top_p': 0.9, 'min_p': 0.01}, {'repetition_penalty': 1.5},
    {'num_samples': 2, 'context': 16}, {'context': 1}], ids=str)
def test_graph_writes_what_single_calls_write(gpt, monkeypatch, options):
    """Within the window and beyond it, for two prompts; an idle graph is used again."""
    made = []

    @contextlib.contextmanager
    def borrowed_graph(gpt, texts, positions, options, compile, steps):
        if compile == 'True' and not made:
            made.append(model.graph_of(gpt, texts, 64, options, 'auto'))
        yield made[0] if compile == 'True' else None
    monkeypatch.setattr(model, 'capture', capture_on_a_cpu)
    monkeypatch.setattr(model, 'borrowed_graph', borrowed_graph)
    idx = torch.randint(1100, (2, 5))
    for seed in 7, 8:
        graph, plain = (torch.stack([ids.clone() for ids in gpt.generate(
            idx, 100, seed=seed, compile=compile, **options)]) for compile in ('True', 'False'))
        assert torch.equal(graph, plain)


def test_graph_that_is_idle_is_lent_again(gpt, monkeypatch, capsys):
    """To one generation at a time; a failed one leaves single calls, a few steps need none."""
    graphs, fails = [], False

    def graph_of(*made_for):
        assert not fails, 'out of memory'
        graphs.append(made_for)
        return object()
    monkeypatch.setattr(model, 'graph_of', graph_of)
    weight = types.SimpleNamespace(is_cuda=True, data_ptr=lambda: 0)
    cuda = type('OnAGPU', (), dict(wpe=types.SimpleNamespace(weight=weight)))()
    lend = functools.partial(model.borrowed_graph, cuda, 1)
    with lend(40, (1.0,), 'auto', 16) as first, lend(64, (1.0,), 'auto', 16) as second:
        assert first is not second and len(graphs) == 2 and graphs[0][2] == 64
    with lend(50, (1.0,), 'auto', 16) as third:
        assert third in (first, second)
    weight.data_ptr = lambda: 1  # the weights have moved
    with lend(50, (1.0,), 'auto', 16) as fourth, lend(50, (0.5,), 'auto', 16) as fifth:
        assert not {first, second, third} & {fourth, fifth} and fourth is not fifth
    with lend(50, (1.0,), 'auto', 16) as sixth:
        assert sixth not in (fourth, fifth)  # the idle ones of one kind are kept
    with lend(50, (1.0,), 'auto', 15) as few, lend(50, (1.0,), 'False', 99) as off:
        assert few is off is None
    fails = True
    with lend(500, (1.0,), 'auto', 99) as failed:
        assert failed is None and 'out of memory' in capsys.readouterr().err
    with model.borrowed_graph(gpt, 1, 40, (1.0,), 'True', 99) as on_a_cpu:
        assert on_a_cpu is None


def test_capture_warms_up_then_records_on_a_stream_of_its_own(monkeypatch):
    """A stream serves one living graph at a time and is used again; a failure brings the current one back."""
    log, current = [], ['default']

    class Stream:
        def __init__(self, device):
            log.append('new stream')

        def wait_stream(self, stream):
            assert stream == 'default'

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    @contextlib.contextmanager
    def recording(graph, stream, capture_error_mode):
        assert stream is current[-1] and capture_error_mode == 'thread_local'
        log.append('record')
        yield
    graph = type('CUDAGraph', (), dict(replay=lambda self: log.append('replay'),
                                      reset=lambda self: log.append('reset')))
    for name, value in dict(Stream=Stream, stream=on, graph=recording, CUDAGraph=graph,
                            current_stream=lambda device: current[-1],
                            device=lambda device: contextlib.nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(model, 'STREAMS', {})
    ids = torch.zeros(2)

    def run(ids):
        log.append('run')
        return ids + 1
    first = model.capture(run, ids)
    assert log == ['new stream', 'run', 'record', 'run'] and current == ['default']
    first(torch.tensor([5.0, 6.0]))
    assert log[4:] == ['replay'] and ids.tolist() == [5, 6]
    second = model.capture(run, ids)
    assert log.count('new stream') == 2
    del first, second
    gc.collect()
    assert log.count('reset') == 2
    model.capture(run, ids)
    assert log.count('new stream') == 2 and current == ['default']


def test_a_step_behind_gives_all_ids_in_order(monkeypatch):
    """Each once its copy has arrived, while the next step is already computed."""
    computed, arrived = [], []

    class Stream:
        def record_event(self):
            number = len(computed)
            return types.SimpleNamespace(synchronize=lambda: arrived.append(number))

    def steps():
        for i in range(3):
            computed.append(i)
            yield torch.tensor([i])
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: Stream())
    assert [(ids.item(), len(computed), len(arrived)) for ids in model.a_step_behind(steps())] == [
        (0, 2, 1), (1, 3, 2), (2, 3, 3)]
    assert arrived == [1, 2, 3]


def test_uniform_numbers_are_those_of_a_generator_a_text():
    ours = list(itertools.islice(model.uniform_numbers(2, 5, 'cpu'), 150))
    for i in range(2):
        generator = torch.Generator().manual_seed(5 + i)
        assert [step[i].item() for step in ours] == [torch.rand(1, generator=generator).item() for _ in ours]


# -- model.py: files -----------------------------------------------------------------------------------------

def test_load_gives_back_all_that_save_was_given(gpt, tmp_path):
    gpt.trained_context = 32
    save_gpt(tmp_path / 'model.pt', gpt, step=5, losses={'train': 1.0}, made_by='a test')
    assert torch.load(tmp_path / 'model.pt', weights_only=True)['model']['wte.weight'].shape == (1100, 32)
    again, meta = load(tmp_path)
    assert (meta['step'], meta['tokenizer'], meta['losses']) == (5, GPT2, {'train': 1.0})
    assert meta['trained_context'] == again.trained_context == 32
    assert meta['path'] == str(tmp_path / 'model.pt') and os.listdir(tmp_path) == ['model.pt']
    idx = torch.randint(1100, (2, 9))
    with torch.no_grad():
        assert torch.equal(again(idx), gpt(idx)) and not again.training
    padded, unpadded = again.train()(idx, idx), again.eval()(idx, idx)
    assert abs(padded - unpadded) < 0.05  # padding must not weigh in the softmax


def test_find_takes_most_steps_then_the_newest_run(gpt, tmp_path):
    def write(name, step):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_gpt(tmp_path / name, gpt, step=step)
        time.sleep(0.02)
        return str(tmp_path / name)
    with pytest.raises(FileNotFoundError, match='quickstart'):
        find(tmp_path)
    write('a/model.pt', 9)
    newest = write('b/ckpt.pt', 3)
    write('b/best.pt', 8)
    write('model_int8.pt', 9)
    assert find(tmp_path) == newest
    deployed = write('model.pt', 5)
    assert find(tmp_path) == deployed == find(deployed)
    write('ckpt.pt', 4)
    assert find(tmp_path) == deployed
    longer = write('ckpt.pt', 6)
    assert find(tmp_path) == longer


def test_find_takes_a_hub_id_and_without_the_hub_its_cache(hub, tmp_path):
    save_hugging_face(tmp_path / 'gpt2')
    hub.folders['gpt2'] = tmp_path / 'gpt2'
    models = load('me/folio')[1]['step'], load('gpt2')[0].config.n_embd
    assert models == (20, 64)
    hub.close()
    assert models == (load('me/folio')[1]['step'], load('gpt2')[0].config.n_embd)
    with pytest.raises(FileNotFoundError, match='me/other: .*not to be had from the Hub.*Connection refused'):
        find('me/other')
    with pytest.raises(FileNotFoundError, match='none: no model.pt'):
        find(str(tmp_path / 'none'))  # no id


@pytest.mark.parametrize('status, words', [
    (401, 'gated repo'), (403, 'gated repo'), (404, 'Repository Not Found'), (500, '500 Internal'),
    (0, '503')])  # cut in the middle, and then 503
def test_find_takes_nothing_that_the_hub_refuses_or_cuts(hub, folder, monkeypatch, status, words):
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)  # its client waits before it tries again
    hub.refusals, hub.cut = ({'me/folio': status}, ()) if status else ({}, ('me/folio',))
    process = run('sample.py', '--checkpoint=me/folio', cwd=folder)
    process.stderr = process.stderr.rpartition('it/s]\n')[2]  # after the client's progress bar
    one_line(process, 1, 'sample.py: me/folio: not here', words, 'hf auth login')
    with pytest.raises(FileNotFoundError):
        find('me/folio')  # what has arrived is no model
    hub.refusals, hub.cut = {}, ()
    assert load('me/folio')[1]['step'] == 20


def test_read_refuses_damaged_files(gpt, tmp_path):
    path = tmp_path / 'model.pt'
    save_gpt(path, gpt)
    whole, contents = path.read_bytes(), read(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (bytes(flipped), whole[:-100], whole[:1000], b'', b'not a model'):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match='model.pt: damaged'):
            load(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match='model.pt: damaged, or not plain'):
        load(path)
    torch.save({**contents, 'format_version': 0}, path)
    with pytest.raises(ValueError, match='format version 0'):
        load(path)
    torch.save({**contents, 'config': dict(SMALL, n_embd=64)}, path)
    with pytest.raises(ValueError, match='do not fit'):
        load(path)
    for key in ('model', 'step', 'trained_context', 'tokenizer'):
        torch.save({name: value for name, value in contents.items() if name != key}, path)
        with pytest.raises(ValueError, match=f'lacks {key}'):
            load(path)


def test_replacing_is_on_disk_before_it_is_renamed(gpt, tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (calls.append(os.readlink(f'/proc/self/fd/{fd}')), fsync(fd)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (calls.append('rename'), replace(a, b)))
    save_gpt(tmp_path / 'model.pt', gpt)
    assert calls == [str(tmp_path / 'model.pt.tmp'), 'rename', str(tmp_path)]


def test_replacing_leaves_what_was_there_when_it_fails(gpt, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, 'No space left on device')
    save_gpt(tmp_path / 'model.pt', gpt, step=1)
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='model.pt could not be written .No space left'):
        save_gpt(tmp_path / 'model.pt', gpt, step=2)
    assert os.listdir(tmp_path) == ['model.pt'] and read(tmp_path / 'model.pt')['step'] == 1


def test_replacing_says_why_torch_could_not_write(gpt, tmp_path, monkeypatch):
    """Its writer raises a RuntimeError of its own while it handles the OSError."""
    def write(*args):
        try:
            raise OSError(28, 'No space left on device')
        finally:
            raise RuntimeError('PytorchStreamWriter failed writing file')
    monkeypatch.setattr(torch, 'save', write)
    with pytest.raises(OSError, match='model.pt could not be written .No space left'):
        save_gpt(tmp_path / 'model.pt', gpt)
    assert not os.listdir(tmp_path)


# -- model.py: other projects' models ------------------------------------------------------------------------

@pytest.mark.parametrize('form', ['one file', 'shards', 'float16', 'padded'])
def test_load_reads_hugging_face_folders(tmp_path, form):
    made = save_hugging_face(tmp_path, vocab_size=50304 if form == 'padded' else 50257)
    if form == 'shards':
        made.save_pretrained(tmp_path, max_shard_size='5MB')
        assert len(list(tmp_path.glob('*.safetensors'))) > 1
    if form == 'float16':
        made.half().save_pretrained(tmp_path)
        made.float()
    ours, meta = load(tmp_path)
    assert (meta['tokenizer'], meta['trained_context'], meta['step']) == (GPT2, 96, 0)
    assert ours.wte.weight.shape == (50304, 64)
    idx = torch.randint(50257, (2, 20))
    if form != 'padded':  # Hugging Face may choose the added ids
        same_network(ours, made, idx)
    ours.train()(idx, idx).backward()  # the weights are ours to train


@pytest.mark.parametrize('change, words', [
    (dict(model_type='llama'), 'llama'),
    (dict(activation_function='gelu'), "'gelu'"),
    (dict(n_head=3), '3'),
    (dict(n_layer=3), 'missing'),
    (dict(n_embd=32), 'missing|mismatched|shape'),
    (dict(vocab_size=50000), "not GPT-2's|shape"),
    (dict(tie_word_embeddings=False), 'token table|missing'),
    (b'{', 'hf: ')], ids=str)
def test_load_refuses_other_networks(tmp_path, change, words):
    save_hugging_face(tmp_path / 'hf')
    said = tmp_path / 'hf/config.json'
    if isinstance(change, dict):
        change = json.dumps({**json.loads(said.read_text()), **change}).encode()
    said.write_bytes(change)
    with pytest.raises(ValueError, match=words):
        load(tmp_path / 'hf')


def test_load_refuses_bad_weights_and_another_vocabulary(tmp_path):
    folder = tmp_path / 'hf'
    made = save_hugging_face(folder)
    words = {'vocab.json': json.dumps({f'token {i}': i for i in range(50257)}),
             'merges.txt': '#version: 0.2\n', 'tokenizer_config.json': '{"tokenizer_class": "GPT2Tokenizer"}'}
    for name, text in words.items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match="not GPT-2's"):
        load(folder)
    for name in words:
        (folder / name).unlink()
    whole = (folder / 'model.safetensors').read_bytes()
    for damaged in (whole[:-50], whole[:50], b''):
        (folder / 'model.safetensors').write_bytes(damaged)
        with pytest.raises(ValueError, match='hf: '):
            load(folder)
    made.transformer.h[1].ln_1.bias.data.fill_(math.nan)
    made.save_pretrained(folder)
    with pytest.raises(ValueError, match='h.1.ln_1.bias is not finite'):
        load(folder)


def test_load_without_transformers_names_the_command(tmp_path, monkeypatch):
    save_hugging_face(tmp_path)
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ValueError, match='pip install transformers'):
        load(tmp_path)


@pytest.mark.parametrize('bias', [True, False])
def test_load_reads_nanogpts_checkpoints(tmp_path, bias):
    contents, made = nanogpt(bias=bias)
    torch.save(contents, tmp_path / 'ckpt.pt')
    ours, meta = load(tmp_path)
    assert (meta['step'], meta['dataset'], meta['tokenizer']) == (30, 'shakespeare', GPT2)
    idx = torch.randint(50257, (2, 30))
    with torch.no_grad():
        assert torch.equal(ours(idx), made(idx)) and ours.config.bias == bias
    process = run('train.py', '--init_from=resume', f'--out_dir={tmp_path}', cwd=tmp_path)
    one_line(process, 1, 'has no ckpt.pt of a run')


def test_load_reads_a_nanogpt_file_of_weights_and_shape_alone(tmp_path):
    contents = nanogpt()[0]
    torch.save({key: contents[key] for key in ('model', 'model_args')}, tmp_path / 'ckpt.pt')
    assert load(tmp_path / 'ckpt.pt')[1]['step'] == 0


@pytest.mark.parametrize('broken', [
    {'model_args': {'vocab_size': 50257}}, {'model_args': {}, 'model': {}}, {'model': {}},
    {'model_args': {'vocab_size': 50257, 'rotary': True}, 'model': {}}, {'model_args': None},
    {'model': {'transformer.wte.weight': torch.ones(())}}], ids=str)
def test_load_refuses_nanogpt_checkpoints_that_are_not_whole(tmp_path, broken):
    torch.save({'model_args': nanogpt()[0]['model_args'], **broken}, tmp_path / 'ckpt.pt')
    one_line(run('sample.py', '--checkpoint=ckpt.pt', cwd=tmp_path), 1, 'incomplete nanoGPT checkpoint')


def test_load_refuses_a_table_with_fewer_rows_than_tokens(tmp_path):
    contents = nanogpt()[0]
    contents['model']['_orig_mod.transformer.wte.weight'] = torch.ones(50000, 64)
    torch.save(contents, tmp_path / 'ckpt.pt')
    one_line(run('sample.py', '--checkpoint=ckpt.pt', cwd=tmp_path), 1, 'do not fit together', 'wte.weight')


def test_load_refuses_nanogpts_characters(tmp_path):
    torch.save(nanogpt(vocab_size=65)[0], tmp_path / 'ckpt.pt')
    one_line(run('sample.py', '--checkpoint=ckpt.pt', cwd=tmp_path), 1, "65 tokens that are not GPT-2's")
    os.makedirs(tmp_path / 'data/evil')
    np.arange(60, dtype='<u2').tofile(tmp_path / 'data/evil/train.bin')
    (tmp_path / 'data/evil/meta.pkl').write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    process = run('train.py', '--dataset=evil', '--out_dir=out/evil', cwd=tmp_path)
    one_line(process, 1, 'data/evil', 'meta.pkl', 'not read')
    assert not (tmp_path / 'pwned').exists()


# -- prepare.py ----------------------------------------------------------------------------------------------

def test_gpt2_tokenizer_equals_tiktoken(reference):
    ours = get_tokenizer(GPT2)
    text = open(CORPUS, encoding='utf-8', newline='').read()
    assert ours.encode(text) == reference.encode_ordinary(text)
    assert (ours.eot, ours.vocab_size) == (reference.eot_token, reference.n_vocab)
    special = 'a<|endoftext|>b'
    assert ours.encode(special, special_tokens=True) == reference.encode(special, allowed_special='all')
    for seed in range(100):
        text = random_text(random.Random(seed), 300)
        assert ours.encode(text) == reference.encode(text, disallowed_special=())
        assert ours.decode_bytes(ours.encode(text)) == text.encode()
    for i in range(50257):
        assert ours.decode_bytes([i]) == reference.decode_bytes([i])
    assert ours.decode_bytes(ours.encode('\ud800')) == '\ufffd'.encode()  # a lone surrogate is no Unicode


@pytest.mark.parametrize('blank', [' ', '\n', '\u3000'])
def test_gpt2_tokenizer_takes_a_million_blanks(reference, blank):
    """tiktoken itself panics there; its tokens of a shorter run show the pattern."""
    ours = get_tokenizer(GPT2)
    for text in ('a' + blank * 150_000 + 'b', blank * 150_000, 'x' + blank * 150_000):
        assert ours.encode(text) == reference.encode_ordinary(text)
    text = 'a' + blank * 2_000_000 + 'b'
    assert ours.decode_bytes(ours.encode(text)) == text.encode()


def test_char_tokenizer_goes_there_and_back():
    tokenizer = CharTokenizer('hello\n🎭日')
    assert tokenizer.vocab_size == 7 and tokenizer.eot is None
    assert tokenizer.decode_bytes(tokenizer.encode('hole🎭日')) == 'hole🎭日'.encode()
    assert tokenizer.encode('\nh') == [tokenizer.start, 2] and tokenizer.encode('') == []
    with pytest.raises(ValueError, match="'x'"):
        tokenizer.encode('hex')
    with pytest.raises(ValueError, match='70,000'):
        CharTokenizer(map(chr, range(70_000)))


def corpus(characters=None):
    with open(CORPUS, encoding='utf-8', newline='') as f:
        return f.read(characters)


def test_bpe_tokenizer_learns_the_same_from_a_text_in_any_pieces():
    text = corpus(200_000)
    whole = learn_tokenizer([text], 1, 700)
    parts = list(cut_exactly(text[i:i + 777] for i in range(0, len(text), 777)))
    assert whole == learn_tokenizer(parts, 1, 700)  # and so on any number of threads
    assert whole['vocab_size'] == 700 == get_tokenizer(whole).vocab_size
    half = learn_tokenizer(parts, 0.5, 700)
    assert half == learn_tokenizer(parts[::2], 1, 700) != whole
    apart = [piece for part in parts for piece in (part, None)]  # every part a document
    assert learn_tokenizer(apart, 0.5, 700) == half
    assert learn_tokenizer([text], 0.01, 700) == whole  # a text without blanks is one piece, and is learnt
    assert learn_tokenizer(['ab ab ab'], 1, 700)['vocab_size'] == 259  # bytes, ab, " ab", the end


def test_bpe_tokenizer_merges_the_most_frequent_pair_first():
    tokenizer = get_tokenizer(learn_tokenizer(['ab ' * 9 + 'zq-' * 30], 1, 300))
    assert tokenizer.decode_bytes([256]) == b'zq'  # 30 times
    assert tokenizer.encode('zq') == [256]


def test_bpe_tokenizer_goes_there_and_back():
    tokenizer = get_tokenizer(learn_tokenizer([corpus(50_000)], 1, 500))
    for seed in range(100):
        text = random_text(random.Random(seed), 300)
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode() and max(ids) < tokenizer.eot == 499
        assert sum(map(tokenizer.encode, cut_exactly([text[:100], text[100:]])), []) == ids
    assert tokenizer.encode('a<|endoftext|>b', special_tokens=True)[1] == 499
    for meta in ({**tokenizer.meta, 'vocab_size': 501}, {**tokenizer.meta, 'tokens': 'AA=='}):
        with pytest.raises(ValueError, match='damaged'):
            get_tokenizer(meta)


def test_bits_per_nat_counts_the_bytes_of_the_text():
    learnt = get_tokenizer(learn_tokenizer(['aa'], 1, 300))
    for tokenizer in (get_tokenizer(GPT2), CharTokenizer('añ日\n'), learnt):
        ids, end = tokenizer.encode('aña日\n' * 30), [tokenizer.eot] * (tokenizer.eot is not None)
        want = len(ids + end) / (30 * 8) / math.log(2)  # 1 + 2 + 1 + 3 + 1 bytes
        assert math.isclose(bits_per_nat(np.array(ids + end), tokenizer), want)
        assert bits_per_nat(np.array(ids + end), tokenizer, 240) == want


def test_cut_exactly_keeps_the_tokens(reference):
    for seed in range(100):
        rng = random.Random(seed)
        text, blocks, at = random_text(rng, 400), [], 0
        while at < len(text):
            size = rng.choice((1, 7, 50, 200))
            blocks.append(text[at:at + size])
            at += size
        pieces = list(cut_exactly(blocks))
        assert ''.join(pieces) == text
        assert sum(map(reference.encode_ordinary, pieces), []) == reference.encode_ordinary(text)


def test_text_stream_is_whole_characters_up_to_its_stop():
    def said(contents, stop=''):
        stream, texts = TextStream(Bytes(), stop), ['']
        for id in contents:
            stream.feed(id)
            texts.append(stream.text)
            assert texts[-1].startswith(texts[-2]) and (not stop or stop not in texts[-1])
        return stream.text + stream.held, stream.ended
    text = 'é日本🎭e\u0301'
    assert said(text.encode()) == (text, '')
    assert said(text.encode()[:-1]) == (text[:-1], '')  # nothing of a character that is cut
    assert said(b'ab\xffc') == ('ab\ufffdc', '')
    assert said(b'one END two', 'END') == ('one ', 'stop string')
    assert said('日本🎭!'.encode(), '🎭') == ('日本', 'stop string')
    assert said(b'EEN EN', 'END') == ('EEN EN', '')  # held back, not lost
    assert said(b'EEND', 'END') == ('E', 'stop string')
    assert said([*b'ab', 256, *b'cd'], 'bc') == ('ab', 'end of text')


def test_stream_texts_ends_with_its_texts_and_closes_the_steps():
    closed = []

    def steps():
        try:
            for a, b in zip(b'one END', [*b'tw', 256, 256, 256, 256, 256]):
                yield torch.tensor([a, b])
            yield torch.tensor([0, 0])  # past the end of both
        finally:
            closed.append(True)
    *_, last = stream_texts(steps(), Bytes(), 2, 'END')
    assert [(text.text, text.ended, len(text.ids)) for text in last] == [
        ('one ', 'stop string', 7), ('tw', 'end of text', 3)]
    texts = stream_texts(steps(), Bytes(), 2)
    next(texts)
    texts.close()
    assert closed == [True, True]


def test_prepare_splits_the_corpus_as_published(tmp_path, monkeypatch, reference):
    monkeypatch.chdir(tmp_path)
    assert prepare(CORPUS)['tokens'] == {'train': 301_966, 'val': 36_059}
    assert prepare(CORPUS, val_fraction=0.0)['tokens'] == {'train': 338_025}
    tokens, val, meta = load_data('shakespeare')
    assert val is None and sorted(os.listdir('data/shakespeare')) == ['meta.json', 'train.bin']
    assert tokens.tolist() == reference.encode_ordinary(open(CORPUS, encoding='utf-8', newline='').read())
    assert meta['source']['sha256'] == '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def test_prepare_takes_folders_globs_and_document_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs('texts/sub')
    for name, text in (('a.txt', 'one'), ('sub/b.txt', 'two\r\n'), ('c.md', 'three')):
        (tmp_path / 'texts' / name).write_bytes(text.encode())
    ours = get_tokenizer(GPT2)
    prepare('texts', 'folder', val_fraction=0.0)
    assert ours.decode_bytes(load_data('folder')[0]) == b'one<|endoftext|>three<|endoftext|>two\r\n'
    prepare('texts', 'cut', val_fraction=0.5)  # after 'one' and 'thr'
    assert ours.decode_bytes(load_data('cut')[0]) == b'one<|endoftext|>thr'
    assert ours.decode_bytes(load_data('cut')[1]) == b'ee<|endoftext|>two\r\n'
    prepare('texts/*', 'glob', 'char', val_fraction=0.0)
    tokens, _, meta = load_data('glob')
    assert CharTokenizer(meta['tokenizer']['characters']).decode_bytes(tokens) == b'one\nthree'
    (tmp_path / 'stories.txt').write_text('once\n<|endoftext|>\nupon')
    for special_tokens in (False, True):
        prepare('stories.txt', 'stories', val_fraction=0.0, special_tokens=special_tokens)
        assert np.count_nonzero(load_data('stories')[0] == 50256) == special_tokens
    (tmp_path / 'stories.txt').write_text('once<|endoftext|>upon')
    tokenizer = get_tokenizer(prepare('stories.txt', 'chars', 'char', 0.0, special_tokens=True)['tokenizer'])
    assert tokenizer.decode_bytes(load_data('chars')[0]) == b'once\nupon'


@pytest.mark.parametrize('packed', [False, True])
def test_prepare_takes_lines_of_json(tmp_path, monkeypatch, packed):
    monkeypatch.chdir(tmp_path)
    opened = gzip.open if packed else open
    os.mkdir('texts')
    with opened('texts/a.JSONL' + '.gz' * packed, 'wt', encoding='utf-8') as f:
        f.write('\n{"text": "two\\nlines", "id": 1}\n{"text": "\\u00e9\\ud83c\\udfad"}')
    with opened('texts/b.txt' + '.gz' * packed, 'wt', encoding='utf-8') as f:
        f.write('plain')
    prepare('texts', 'mixed', val_fraction=0.0)
    tokens, _, meta = load_data('mixed')
    text = 'two\nlines<|endoftext|>é🎭<|endoftext|>plain'.encode()
    assert get_tokenizer(GPT2).decode_bytes(tokens) == text
    assert meta['bytes'] == {'train': len(text) - 2 * 13}
    prepare('texts', 'characters', 'char', val_fraction=0.0)
    tokens, _, meta = load_data('characters')
    assert get_tokenizer(meta['tokenizer']).decode_bytes(tokens) == text.replace(b'<|endoftext|>', b'\n')


@pytest.mark.parametrize('name, content, words', [
    ('a.jsonl', b'{"text": "a"}\n{"txt": "b"}\n', 'a.jsonl, line 2: '),
    ('a.jsonl', b'["text"]\n', 'a.jsonl, line 1: '), ('a.jsonl', b'{"text": 5}\n', 'a.jsonl, line 1: '),
    ('a.jsonl', b'{"text": "\\ud800"}\n', 'line 1: '), ('a.jsonl', b'\n{"text": "\xff"}\n', 'line 2: '),
    ('a.jsonl', b'[' * 100_000, 'line 1: '), ('a.txt.gz', b'plain', 'a.txt.gz: damaged'),
    ('a.txt.gz', gzip.compress(b'words ' * 99, mtime=0)[:-9], 'a.txt.gz: damaged')])
def test_prepare_names_a_bad_line_and_a_damaged_file(tmp_path, monkeypatch, name, content, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        prepare(name, 'bad')
    assert not (tmp_path / 'data/bad/meta.json').exists()


@pytest.mark.parametrize('size, ids', [(100_000, 1024), (500_000, 2048)])
def test_prepare_chooses_a_vocabulary_by_the_text(tmp_path, monkeypatch, size, ids):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text').write_text(corpus(size), newline='')
    meta = prepare('text', 'chosen', 'bpe')
    assert meta['tokenizer']['vocab_size'] == ids and meta['vocab_size'] == 0
    assert meta['bytes'] == {'train': size * 9 // 10, 'val': size - size * 9 // 10}
    training = corpus(size)[:size * 9 // 10]
    assert meta['tokenizer'] == learn_tokenizer([training], 1, ids)  # nothing of the validation text


def test_prepare_refuses_bad_texts_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'good.txt').write_text('some words to keep')
    (tmp_path / 'bad.txt').write_bytes(b'x' * 70_000 + '🎭'.encode()[:2] + b'y')
    (tmp_path / 'empty.txt').write_text('')
    prepare('good.txt', 'kept')
    before = contents_of(tmp_path / 'data/kept')
    for name, words in (('bad.txt', 'bad.txt: not UTF-8 at byte 70,000'), ('empty.txt', 'empty'),
                        ('none.txt', 'no files there'), ('', 'no input')):
        with pytest.raises((ValueError, OSError), match=words):
            prepare(name, 'kept')
        assert contents_of(tmp_path / 'data/kept') == before
    with pytest.raises(ValueError, match='nothing to train on'):
        prepare('good.txt', 'kept', val_fraction=2.0)
    (tmp_path / 'data/kept/val.bin').write_bytes(b'123')
    with pytest.raises(ValueError, match='val.bin: 3 bytes'):
        load_data('kept')
    (tmp_path / 'data/kept/val.bin').unlink()
    with pytest.raises(ValueError, match='val.bin: 0 bytes .* prepare it again'):
        load_data('kept')


@pytest.mark.parametrize('call, times', [('replace', 6), ('fsync', 4)])
def test_prepare_puts_back_what_was_there_when_it_fails(tmp_path, monkeypatch, call, times):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.txt').write_text('some words to keep')
    prepare('text.txt', 'kept', 'char')
    before, real, calls = contents_of(tmp_path / 'data/kept'), getattr(os, call), []

    def failing(*args):
        calls.append(args)
        if len(calls) == fail_at:
            raise OSError(5, 'Input/output error')
        return real(*args)
    monkeypatch.setattr(os, call, failing)
    for fail_at in range(1, times + 1):
        calls.clear()
        with pytest.raises(OSError, match='data/kept'):
            prepare('text.txt', 'kept', 'bpe', vocab_size=257)
        assert contents_of(tmp_path / 'data/kept') == before
    calls.clear()
    fail_at = 0
    prepare('text.txt', 'kept', 'bpe', vocab_size=257)
    assert len(calls) == times and set(os.listdir('data/kept')) == set(before)


def test_prepare_with_keep_keeps_what_a_killed_process_left(tmp_path, monkeypatch):
    """The old files, which it had moved away, come back first. No file of them may be there for new data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.txt').write_text('some words to keep')
    prepare('text.txt', 'kept', 'char', keep=True)
    before = contents_of(tmp_path / 'data/kept')
    for moved in (['train.bin'], ['train.bin', 'meta.json'], ['train.bin', 'meta.json', 'val.bin'], []):
        os.makedirs('data/kept/.new')
        for name in moved:
            os.rename(f'data/kept/{name}', f'data/kept/.new/{name}.old')
        with pytest.raises(ValueError, match='has data'):
            prepare('text.txt', 'kept', 'bpe', vocab_size=257, keep=True)
        assert contents_of(tmp_path / 'data/kept') == before


def test_prepare_holds_the_lock_from_its_first_reading_on(tmp_path, monkeypatch):
    """So of two runs that start on a text at once, one is refused before it has done the work again."""
    def reading(path, digest=None):
        with pytest.raises(ValueError, match='another process uses it'):
            FolderLock('data/new')
        return ['some words to keep']
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.txt').touch()
    monkeypatch.setattr('prepare.read_text', reading)
    assert prepare('text.txt', 'new', 'char')['tokens'] == {'train': 16, 'val': 2}


def test_folder_lock_holds_a_folder_against_another_process(folder):
    """prepare.py and train.py are refused in one line, and nothing changes; the lock ends with its holder."""
    before = contents_of(folder / 'data/tiny'), contents_of(folder / 'out/tiny')
    held = [FolderLock(folder / name) for name in ('data/tiny', 'out/tiny')]
    for script, args in (('prepare.py', ['--dataset=tiny']), ('train.py', [*TINY_RUN, '--overwrite'])):
        out = ['--out_dir=out/tiny'] * (script == 'train.py')
        one_line(run(script, *args, *out, cwd=folder), 1, 'another process')
    del held
    assert before == (contents_of(folder / 'data/tiny'), contents_of(folder / 'out/tiny'))
    code = "import os, prepare; lock = prepare.FolderLock('locked'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, '-c', code], cwd=folder, env={**os.environ, 'PYTHONPATH': HERE})
    FolderLock(folder / 'locked')


def test_replacing_files_puts_back_what_a_killed_process_moved_away(tmp_path):
    (tmp_path / '.new').mkdir()
    (tmp_path / '.new/train.bin.old').write_text('old')
    with pytest.raises(OSError), replacing_files(tmp_path, ('train.bin', 'meta.json')):
        raise OSError('the disk is full')
    assert os.listdir(tmp_path) == ['train.bin'] and (tmp_path / 'train.bin').read_text() == 'old'


def test_load_data_refuses_ids_beyond_an_older_vocabulary(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / 'data/tiny', tmp_path / 'data/old')
    meta = json.loads((tmp_path / 'data/old/meta.json').read_text())
    older = {key: meta[key] for key in meta if key not in ('sha256', 'checksum')}
    (tmp_path / 'data/old/meta.json').write_text(json.dumps(older))
    monkeypatch.chdir(tmp_path)
    load_data('old')
    ids = np.memmap(tmp_path / 'data/old/train.bin', dtype='<u2', mode='r+')
    ids[5] = 60_000
    ids.flush()
    with pytest.raises(ValueError, match='has ids that are not in its vocabulary'):
        load_data('old')


@pytest.mark.parametrize('tokens', [None, 5, {'train': None}, {'train': 'many'}, [[]] * 2000])
def test_load_data_refuses_an_older_meta_whose_counts_are_damaged(tmp_path, monkeypatch, tokens):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.txt').write_text('to be or not to be ' * 20)
    meta = prepare('text.txt', 'old', 'char')
    older = {key: meta[key] for key in meta if key != 'sha256'} | {'tokens': tokens}
    (tmp_path / 'data/old/meta.json').write_text(json.dumps(older))
    with pytest.raises(ValueError, match='meta.json: damaged'):
        load_data('old')


def test_load_data_ignores_a_val_bin_that_meta_json_does_not_name(tmp_path, monkeypatch):
    """A process that prepares again, with a validation split, may be killed between its renames."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.txt').write_text('to be or not to be ' * 20)
    prepare('text.txt', 'whole', 'char', 0.0)
    (tmp_path / 'data/whole/val.bin').write_bytes(b'1234')
    train_ids, val_ids, _ = load_data('whole')
    assert len(train_ids) == 380 and val_ids is None


@pytest.mark.parametrize('asked', [0, 260, 5000])
def test_check_data_takes_the_ids_asked_for_and_those_there(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.txt').write_text('to be or not to be ' * 200)
    meta = prepare('text.txt', 'some', 'bpe', vocab_size=asked)
    check_data('some', meta, {'vocab_size': asked})
    check_data('some', meta, {'vocab_size': meta['tokenizer']['vocab_size']})
    with pytest.raises(ValueError, match=f"vocab_size {meta['tokenizer']['vocab_size']} differs from 300"):
        check_data('some', meta, {'vocab_size': 300})


@pytest.mark.parametrize('name', ['train.bin', 'val.bin', 'meta.json'])
def test_load_data_notices_every_flipped_bit(tmp_path, monkeypatch, name):
    """Or what it loads is equal: a blank between two values may be another blank."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.txt').write_text('to be or not to be ' * 200)
    prepare('text.txt', 'bits', 'bpe', vocab_size=260)
    file = tmp_path / 'data/bits' / name
    good, (train, val, meta) = file.read_bytes(), load_data('bits')
    train, val, noticed, places = train.copy(), val.copy(), 0, random.Random(0)
    for _ in range(60):
        bad = bytearray(good)
        bad[places.randrange(len(bad))] ^= 1 << places.randrange(8)
        file.write_bytes(bad)
        try:
            ours = load_data('bits')
            assert ours[2] == meta and (ours[0] == train).all() and (ours[1] == val).all()
        except ValueError as error:
            noticed += name in str(error)
    assert noticed >= (60 if name.endswith('bin') else 40)


@pytest.mark.parametrize('name', ['"checksum"', '"sha256": {'])
def test_load_data_notices_a_flipped_bit_in_the_name_of_a_checksum(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.txt').write_text('to be or not to be ' * 20)
    prepare('text.txt', 'bits', 'char')
    meta = tmp_path / 'data/bits/meta.json'
    assert meta.read_text().count(name) == 1
    meta.write_text(meta.read_text().replace(name, name.replace('s', 'r', 1)))
    with pytest.raises(ValueError, match='meta.json: damaged'):
        load_data('bits')


def test_prepare_imports_no_torch():
    code = 'import sys, prepare; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], cwd=HERE, check=True)


def test_prepare_as_a_user_runs_it(folder):
    args = ['--tokenizer=char', '--dataset=again', '--val_fraction=0.25']
    status, out, error = ended(spawn('prepare.py', *args, cwd=folder))
    assert status == 0 and 'data/again/val.bin' in out, error
    meta = json.loads((folder / 'data/again/meta.json').read_text(encoding='utf-8'))
    text = (folder / 'input.txt').read_text(encoding='utf-8')
    assert meta['tokens'] == {'train': 1440, 'val': 480} and meta['tokenizer']['vocab_size'] == len(set(text))


@pytest.mark.parametrize('args, status, words', [
    ('--datset=x', 2, 'dataset'),
    ('--val_fraction=one', 2, 'float'),
    ('--val_fraction=1', 2, 'at most'),
    ('--input=none', 1, 'none'),
    ('--tokenizer=bp', 2, 'gpt2, bpe, char'),
    ('--tokenizer=bpe --vocab_size=256', 2, '257'),
    ('--vocab_size=300', 1, 'take bpe'),
    ('--dataset=', 2, 'below data/'),
    ('input.txt', 2, 'no such config file')])
def test_prepare_refuses_in_one_line(folder, args, status, words):
    one_line(run('prepare.py', *args.split(), cwd=folder), status, 'prepare.py: ', words)


# -- config/ -------------------------------------------------------------------------------------------------

def configured(monkeypatch, *args):
    """(The settings that configure() returns for this command line, the namespace it changed)."""
    monkeypatch.setattr(sys, 'argv', ['script.py', *map(str, args)])
    namespace = dict(batch_size=8, lr=0.1, name='a', flag=False, compile='auto',
                     _private=3, math=math, LIMIT=1)  # these three are no settings
    return config.configure(namespace, dict(batch_size=(1, 99))), namespace


def test_configure_applies_in_order(monkeypatch, tmp_path):
    file = tmp_path / 'one.py'
    file.write_text('import math\n_half = batch_size // 2\nbatch_size = _half\n'
                    'def f(): return lr\nlr = 2 * f()\ncompile = False\n')
    args = ['--batch_size=10', file, '--name', 'x=y', '--flag', '--lr=1e-3']
    settings, namespace = configured(monkeypatch, *args)
    assert settings == dict(batch_size=5, lr=0.001, name='x=y', flag=True, compile='False')
    assert namespace['batch_size'] == 5 and config.given == {'batch_size', 'name', 'flag', 'lr', 'compile'}
    settings, _ = configured(monkeypatch, '--lr=3', '--flag', 'False', '--name=')
    assert settings == dict(batch_size=8, lr=3.0, name='', flag=False, compile='auto')
    assert configured(monkeypatch)[0]['flag'] is False and not config.given


@pytest.mark.parametrize('args, words', [
    ('--batchsize=3', "batchsize 'batch_size'"),
    ('--_private=1', 'unknown'),
    ('--', 'unknown'),
    ('--batch_size=x', "batch_size int 'x'"),
    ('--batch_size=1e3', 'int'),
    ('--batch_size=True', 'int'),
    ('--lr=True', 'float'),
    ('--flag=1', 'bool'),
    ('--batch_size', 'needs a value'),
    ('--name --flag', 'needs a value'),
    ('--batch_size=100', 'at most 99'),
    ('--batch_size=0', 'at least 1'),
    ('--lr=-1', 'at least 0'),
    ('--lr=nan', 'at least 0'),
    (f'--lr={10**400}', 'lr at most 9223372036854775807'),
    ('--lr=inf', 'at most'),
    ('--name=a\0b', 'UTF-8 NUL'),
    ('nope.py', 'nope.py no such config file')])
def test_configure_refuses_wrong_settings(monkeypatch, capsys, args, words):
    with pytest.raises(SystemExit) as leaving:
        configured(monkeypatch, *args.split())
    lines = capsys.readouterr().err.splitlines()
    assert leaving.value.code == 2 and len(lines) == 1 and lines[0].startswith('script.py: ')
    assert all(word in lines[0] for word in words.split()), lines


@pytest.mark.parametrize('source, words', [
    ('batchsize = 3', "'batch_size'"),
    ('x = [1]', 'unknown'),
    ('batch_size = 2.0', 'int 2.0'),
    ('batch_size = True', 'int'),
    ('batch_size = print', 'int'),
    ('name = 3', 'str'),
    ('name = True', 'str'),
    ('a b', 'line 1 SyntaxError'),
    ('raise KeyboardInterrupt', 'line 1 KeyboardInterrupt'),
    ('\nlr = nope', 'line 2 nope')])
def test_configure_refuses_wrong_files(monkeypatch, capsys, tmp_path, source, words):
    (tmp_path / 'c.py').write_text(source)
    with pytest.raises(SystemExit) as leaving:
        configured(monkeypatch, tmp_path / 'c.py')
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and all(word in error for word in ('c.py', *words.split())), error


@pytest.mark.parametrize('script', ['prepare.py', 'train.py', 'sample.py', 'quantize.py', 'app.py'])
def test_configure_helps_with_the_source(script, tmp_path):
    process = done(run(script, '--help', cwd=tmp_path))
    source = open(os.path.join(HERE, script), encoding='utf-8').read()
    assert process.stderr == '' and source.split('"""')[1].strip() in process.stdout
    body = source.split("\nif __name__ == '__main__':")[0 if script == 'app.py' else -1]
    stated = re.findall(r"^ *(\w+) = ['\w.-]+ +# ", body[:body.index('configure(globals()')], re.M)
    shown = re.findall(r'^  --(\w+)=', process.stdout, re.M)
    assert len(shown) >= 5 and shown == stated


def test_merge_takes_what_was_not_given(monkeypatch, capsys):
    settings, namespace = configured(monkeypatch, '--lr=0.5')
    config.merge(settings, namespace, dict(batch_size=3, lr=0.2, gone=1), ('batch_size',), 'the run')
    assert settings['batch_size'] == namespace['batch_size'] == 3
    assert settings['lr'] == 0.5 and 'gone' not in settings
    with pytest.raises(SystemExit):
        config.merge(settings, namespace, dict(lr=0.2), ('lr',), 'the run')
    assert '--lr=0.5: the run has 0.2' in capsys.readouterr().err


# -- train.py: its parts -------------------------------------------------------------------------------------

@pytest.mark.parametrize('shape', [(3, 24, 24), (2, 96, 24), (1, 24, 96)], ids=str)
def test_orthogonalize_brings_most_singular_values_near_1(shape):
    torch.manual_seed(1)
    x = torch.randn(shape)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    y = train.orthogonalize(x)
    values = torch.linalg.svdvals(y)
    assert values.quantile(0.25) > 0.3 and values.max() < 1.9
    assert torch.cosine_similarity((u @ vt).flatten(1), y.flatten(1)).min() > 0.8  # in the same directions


def test_muon_steps_as_torchs(monkeypatch):
    """With torch's polynomials; q, k and v apart."""
    if not hasattr(torch.optim, 'Muon'):
        pytest.skip('this torch has no torch.optim.Muon')
    monkeypatch.setattr(train, 'POLYNOMIALS', 5 * [(3.4445, -4.7750, 2.0315)])
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(96, 32))
    parts = [torch.nn.Parameter(part.clone()) for part in ours.data.chunk(3)]
    muon = train.Muon([{'params': [ours], 'weight_decay': 0.1}], lr=1e-2, dtype=torch.float32)
    theirs = torch.optim.Muon(parts, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn='match_rms_adamw')
    for _ in range(3):
        grad = torch.randn(96, 32)
        ours.grad = grad.clone()
        for part, part_grad in zip(parts, grad.chunk(3)):
            part.grad = part_grad.clone()
        muon.step()
        theirs.step()
    assert (ours - torch.cat(parts)).abs().max() < 0.1 * 1e-2  # torch runs the products in bfloat16


@pytest.mark.parametrize('overflowing', [0, 1, None])
def test_step_together_is_all_or_none(overflowing):
    """An infinite gradient in either optimizer's group: no weight moves, and the scale is halved."""
    weights = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    optimizers = [torch.optim.AdamW(weights[:1], fused=True), train.Muon([dict(params=weights[1:])], lr=0.1)]
    scaler = torch.amp.GradScaler('cpu', init_scale=8.0)
    scaler.scale(sum(w.sum() for w in weights)).backward()
    if overflowing is not None:
        weights[overflowing].grad[1, 2] = math.inf
    for one in optimizers:
        scaler.unscale_(one)
    train.step_together(optimizers, scaler, torch.nn.utils.clip_grad_norm_(weights, 1.0))
    assert [torch.equal(w, torch.ones(4, 4)) for w in weights] == 2 * [overflowing is not None]
    assert scaler.get_scale() == (8 if overflowing is None else 4)
    assert all(w.isfinite().all() for w in weights)


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA L4', 121e12),
    ('NVIDIA L40S', 362e12), ('NVIDIA L40S-24Q', 0), ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', 0)])
def test_peak_flops_knows_exact_names(name, peak, monkeypatch):
    """A part of a GPU, or one that is not known, has no peak; and float32 has none."""
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    assert train.peak_flops('cuda:0', torch.bfloat16, False) == peak
    assert train.peak_flops('cuda:0', torch.float32, False) == 0


@pytest.mark.parametrize('schedule', ['cosine', 'onecycle', 'linear', 'constant'])
def test_rate_equals_the_published_formulas(schedule):
    """Reference run D's published rule, scaled to 50 steps; torch's OneCycleLR for run E."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, total_steps=50)
    for i in range(50):
        rate, beta1 = train.rate_at(i, 50, schedule, peak=3e-4, least=3e-5, warmup=5, beta1=0.9)
        x = (i - 5) / 45
        want = {'cosine': 3e-5 + 2.7e-4 * (1 + math.cos(math.pi * x)) / 2, 'linear': 3e-4 - 2.7e-4 * x,
                'constant': 3e-4, 'onecycle': optimizer.param_groups[0]['lr']}[schedule]
        if schedule == 'onecycle':
            assert abs(beta1 - optimizer.param_groups[0]['betas'][0]) < 1e-9
        elif i < 5:
            want = 3e-4 * (i + 1) / 5
        assert abs(rate - want) < 1e-9
        optimizer.step()
        if i < 49:
            scheduler.step()


@pytest.mark.parametrize('shift', [True, False])
def test_windows_are_all_of_the_split_once_an_epoch(shift):
    tokens = np.arange(1000, dtype=np.uint16)
    windows = train.Windows(tokens, 16, 'cpu', seed=3, shift=shift)
    assert windows.count == 62
    for epoch in (0, 1):
        x, y = windows.batch(epoch * 62, 62)
        assert torch.equal(x[:, 1:], y[:, :-1]) and x[:, 0].unique().numel() == 62
        if shift:  # the window pushed off the end covers the head, and may overlap the next one
            assert x.unique().numel() > 61 * 16
        else:
            assert x.unique().numel() == 62 * 16 and not (x[:, 0] % 16).any()
    again = train.Windows(tokens, 16, 'cpu', seed=3, shift=shift)
    assert torch.equal(again.batch(70, 4)[0], windows.batch(60, 14)[0][10:])  # by seed and number alone


@pytest.mark.parametrize('shift', [True, False])
def test_windows_have_the_order_of_earlier_runs(shift, T=8, count=8009):
    """Or a run that was begun with an earlier folio could not go on with the same batches."""
    tokens = np.arange(T * count + 3, dtype=np.uint32)  # each holds its position
    rng = np.random.default_rng((3, 5))
    expected = rng.permutation(count) * T + (rng.integers(T) if shift else 0)
    x, _ = train.Windows(tokens, T, 'cpu', seed=3, shift=shift).batch(5 * count, count)
    assert np.array_equal(x[:, 0], np.where(expected + T < len(tokens), expected, 0))


def test_windows_of_ten_billion_tokens_have_a_small_table():
    windows = train.Windows(np.broadcast_to(np.uint16(0), 10**10), 1024, 'cpu', shift=True)
    with tracing() as peak:
        windows.batch(windows.count - 1, 2)  # over an epoch's end, where its table and the next are there
        assert windows.count == 9_765_624 and peak() < 200e6


# -- train.py: as a user runs it -----------------------------------------------------------------------------

def test_train_reports_and_writes(folder):
    out, text = folder / 'out/tiny', (folder / 'stdout.txt').read_text(encoding='utf-8')
    assert sorted(os.listdir(out)) == ['best.pt', 'ckpt.pt', 'log.csv', 'model.pt']
    rows = log_of(out)
    assert [row['step'] for row in rows] == ['5', '10', '15', '20']
    assert [bool(row['val_loss']) for row in rows] == [False, True, False, True]
    for words in ('parameters', 'training tokens', 'steps an epoch', 'tok/s', 'left', 'max_iters 20 reached',
                  'at first', 'first step under', 'best', 'validation', 'train'):
        assert words in text, words
    gpt, meta = load(out)
    _, val, data_meta = load_data(folder / 'data/tiny')
    assert (meta['step'], meta['tokenizer'], meta['trained_context']) == (20, data_meta['tokenizer'], 16)
    assert abs(meta['losses']['validation'] - split_loss(gpt, val, 16)) < 1e-5
    for name in ('ckpt.pt', 'best.pt', 'model.pt'):
        torch.load(out / name, weights_only=True)


@pytest.mark.parametrize('eval_iters', [2, 50])
def test_train_evaluates_to_the_end_of_a_split(folder, eval_iters):
    """Windows spread evenly from the first to the last; of a short split every token."""
    out = f'evaluated_{eval_iters}'
    tiny_run(folder, out, f'--eval_iters={eval_iters}')
    gpt, val = load(folder / 'out' / out)[0], load_data(folder / 'data/tiny')[1]
    assert len(val) == 192  # 11 windows of 16 and a shorter one
    loss = split_loss(gpt, val, 16)
    if eval_iters == 2:  # batches of 4
        windows = [val[16 * i:16 * i + 17] for i in (0, 1, 2, 4, 5, 7, 8, 10)]
        loss = np.mean([split_loss(gpt, window, 16) for window in windows])
    assert abs(float(log_of(folder / 'out' / out)[-1]['val_loss']) - loss) < 1e-5


@pytest.mark.parametrize('preset', PRESETS)
def test_train_starts_every_preset(preset, folder, tmp_path):
    """With a tiny shape, for two steps; each writes to its own folder."""
    name, shape = preset.removesuffix('.py'), TINY_MODEL
    shutil.copy(folder / 'input.txt', tmp_path)
    if name == 'finetune':
        shutil.copytree(folder / 'out/tiny', tmp_path / 'parent')
        shape = ['--init_from=parent']
    process = done(run('train.py', f'config/{preset}', *shape, '--seq_len=16', '--batch_size=2',
                       '--max_iters=2', '--max_minutes=0', '--eval_iters=1', '--final_eval_tokens=50',
                       '--gradient_accumulation_steps=1', cwd=tmp_path))
    assert 'max_iters 2 reached' in process.stdout
    if name == 'bench':
        assert 'nothing written' in process.stdout and 'mfu' in process.stdout
        assert not (tmp_path / 'out').exists()
        return
    out = tmp_path / 'out' / (name if name != 'shakespeare' else '')
    settings = read(out / 'ckpt.pt')['settings']
    assert (out / 'model.pt').exists()
    if re.search(r'_b\d|int8', name):  # the published runs
        assert settings['val_fraction'] == 0 and settings['shift_windows'] is False


@pytest.mark.parametrize('size, parameters', [('gpt2', 124_439_808), ('gpt2_medium', 354_823_168),
                                              ('gpt2_large', 774_030_080), ('gpt2_xl', 1_557_611_200)])
def test_gpt2_presets_fit_80_gb(size, parameters):
    """OpenAI's shapes, half a million tokens a step; by the formula a tenth of a GPU is left."""
    memory_of = runpy.run_path(f'{HERE}/.ci/memory')['memory_of']
    preset, shape = config.run_file(f'config/{size}.py', {}), ('n_layer', 'n_head', 'n_embd')
    assert GPTConfig(**{key: preset[key] for key in shape if key in preset}).num_params() == parameters
    assert preset['batch_size'] * preset['gradient_accumulation_steps'] * 1024 == 2**19
    with open(f'{HERE}/config/{size}.py', encoding='utf-8') as f:
        stated = int(re.search(r'(\d+) GB by .ci/memory', f.read())[1])
    assert round(memory_of(preset, 8) / 1e9) == stated < 72


@pytest.mark.parametrize('tokens, n_layer, block_size, dropout, weight_decay', [
    (5, 2, 64, 0.2, 1.0), (100_000, 4, 64, 0.2, 0.5), (150_000, 4, 64, 0.1, 0.3), (10**9, 4, 128, 0.0, 0.1)])
def test_settings_for_a_text_of_any_size(tokens, n_layer, block_size, dropout, weight_decay):
    chosen = train.settings_for(tokens)
    GPTConfig(chosen['block_size'], 512, *(chosen[key] for key in ('n_layer', 'n_head', 'n_embd')))
    wanted = dict(n_layer=n_layer, block_size=block_size, dropout=dropout, weight_decay=weight_decay)
    assert {key: chosen[key] for key in wanted} == wanted


def test_train_chooses_a_model_for_a_text_of_ones_own(folder, tmp_path):
    """Every 0 is chosen, what was given stays, a resumed run keeps all, and model.pt has the best weights."""
    one_line(run('train.py', 'config/mine.py', '--input=', cwd=tmp_path), 1, 'no input')
    (tmp_path / 'my.txt').write_text(corpus(20_000), newline='')
    args = ['config/mine.py', '--input=my.txt', '--n_embd=32', '--n_head=2', '--eval_interval=1',
            '--eval_iters=1', '--learning_rate=0.5', '--patience=2', '--final_eval_tokens=300',
            '--sample_interval=0']
    first = done(run('train.py', *args, '--max_minutes=1e-6', cwd=tmp_path))
    chosen = train.settings_for(training_tokens(tmp_path, 'mine'))
    assert f"chosen for {training_tokens(tmp_path, 'mine'):,} training tokens" in first.stdout
    second = done(run('train.py', *args, '--init_from=resume', '--max_minutes=0', cwd=tmp_path))
    assert 'chosen' not in second.stdout and 'no better validation loss in 2 evaluations' in second.stdout
    about = read(tmp_path / 'out/mine/ckpt.pt')
    for key, value in {**chosen, 'n_embd': 32, 'n_head': 2}.items():
        assert about['settings'][key] == value
    more = ['config/mine.py', '--init_from=out/mine', '--out_dir=out/more', '--max_minutes=1e-6']
    third = done(run('train.py', *more, cwd=tmp_path)).stdout  # the shape is the other model's
    assert f"training tokens: dropout=0.2 max_iters={chosen['max_iters']}\n" in third
    kept = read(tmp_path / 'out/more/ckpt.pt')['settings']
    assert [kept[key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size')] == [2, 2, 32, 64]
    assert kept['weight_decay'] == 0.1
    best, last = (read(tmp_path / f'out/mine/{name}.pt') for name in ('best', 'model'))
    assert torch.equal(best['model']['wte.weight'], last['model']['wte.weight'])
    assert last['step'] == about['step'] > best['step']


def test_train_logs_bits_per_byte(folder):
    """They are the validation loss by the bytes; a log from before they were there keeps its columns."""
    tiny_run(folder, 'bits')
    log, (_, val, meta) = folder / 'out/bits/log.csv', load_data(folder / 'data/tiny')
    row = list(csv.DictReader(log.open()))[-1]
    bits = float(row['val_loss']) * len(val) / meta['bytes']['val'] / math.log(2)
    assert list(row)[-1] == 'val_bpb' and abs(float(row['val_bpb']) - bits) < 1e-5
    old = '\n'.join(line.rpartition(',')[0] for line in log.read_text().splitlines()) + '\n'
    log.write_text(old)
    state = read(folder / 'out/bits/ckpt.pt')
    torch.save({**state, 'state': {**state['state'], 'log_bytes': len(old)}}, folder / 'out/bits/ckpt.pt')
    tiny_run(folder, 'bits', '--init_from=resume', '--max_iters=30')
    assert log.read_text().startswith(old)
    assert {len(line.split(',')) for line in log.read_text().splitlines()} == {8}


@pytest.mark.parametrize('choice', [
    'optimizer=adamw',
    'optimizer=muon',
    'schedule=cosine',
    'schedule=onecycle',
    'schedule=linear',
    'schedule=constant',
    'dtype=float32',
    'dtype=bfloat16',
    'dtype=float16',
    'gradient_checkpointing',
    'bias=False'])
def test_train_lowers_the_loss_with_each(choice, folder):
    out = f"each_{choice.replace('=', '_')}"
    tiny_run(folder, out, '--max_iters=40', '--learning_rate=1e-2', '--warmup_iters=2', '--eval_interval=0',
             '--checkpoint_interval=0', f'--{choice}')
    losses = [float(row['loss']) for row in log_of(folder / 'out' / out)]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize('args, status, words', [
    ('--learning_rat=1', 2, ['learning_rate']),
    ('--max_iters=many', 2, ['int']),
    ('--max_iters=1000000001', 2, ['at most 1000000000']),
    ('--n_head=3', 2, ['n_embd', 'n_head']),
    ('--n_embd=100000000000', 1, ['out of memory', '--batch_size']),
    ('--n_embd=4000000000000000000', 1, ['out of memory']),
    ('--dropout=1', 2, ['dropout']),
    ('--seq_len=99', 2, ['seq_len', '16']),
    ('--block_size=5000', 1, ['windows of 5,000']),
    ('--schedule=cosin', 2, ['cosine']),
    ('--device=tpu', 2, ['tpu']),
    ('--patience=1 --eval_interval=0', 2, ['eval_interval']),
    ('--dataset=../x', 2, ['below data/']),
    ('--tokenizer=gpt2', 2, ['char', 'gpt2']),
    ('--vocab_size=300', 2, ['vocab_size', '300']),
    ('--val_fraction=0.5', 2, ['0.1', '0.5']),
    ('--input=other.txt', 2, ['input.txt', 'other.txt']),
    ('--input=none.txt', 1, ['none.txt']),
    ('--init_from=resume', 1, ['has no ckpt.pt of a run']),
    ('--init_from=nope.pt', 1, ['nope.pt'])])
def test_train_refuses_in_one_line(folder, args, status, words):
    (folder / 'other.txt').write_text('another text')
    process = run('train.py', *TINY_RUN, '--out_dir=out/none', *args.split(), cwd=folder)
    one_line(process, status, 'train.py: ', *words)
    assert not list((folder / 'out').glob('none/*'))  # at most an empty folder


@pytest.mark.parametrize('args, status, words', [
    ('', 1, ['--init_from=resume', '--overwrite']),
    ('--init_from=resume --n_layer=2', 2, ['n_layer', '1']),
    ('--init_from=resume --optimizer=muon', 2, ['optimizer', 'adamw'])])
def test_train_refuses_to_start_over_a_run(folder, args, status, words):
    before = contents_of(folder / 'out/tiny')
    one_line(run('train.py', *TINY_RUN, '--out_dir=out/tiny', *args.split(), cwd=folder), status, *words)
    assert contents_of(folder / 'out/tiny') == before


def test_train_sets_the_gpu_first(tmp_path, monkeypatch):
    """By a name that torch itself reads as the GPU that was asked for."""
    class Reached(Exception):
        pass

    def set_device(name):
        assert torch.cuda._utils._get_device_index(name) == 1
        raise Reached
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', set_device)
    assert 'Reached' in run('train.py', '--device=cuda:1', cwd=tmp_path).stderr


def test_train_sets_what_makes_a_gpu_repeat_itself(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, 'use_deterministic_algorithms', calls.append)
    monkeypatch.setattr(os, 'environ', dict(os.environ))
    tiny_run(folder, 'repeating', '--deterministic', '--max_iters=1')
    assert calls == [True, False]  # False: this file's run()
    assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'
    assert os.environ['TORCHINDUCTOR_DETERMINISTIC'] == '1'


def test_train_has_the_same_weights_however_it_logs(folder):
    tiny_run(folder, 'quiet', '--log_interval=0', '--eval_interval=0', '--sample_interval=7')
    quiet, loud = load(folder / 'out/quiet')[0], load(folder / 'out/tiny')[0]
    assert all(torch.equal(a, b) for a, b in zip(quiet.state_dict().values(), loud.state_dict().values()))


def test_train_accumulates_as_one_larger_batch(folder):
    tiny_run(folder, 'one', '--batch_size=8')
    tiny_run(folder, 'two', '--batch_size=4', '--gradient_accumulation_steps=2')
    one, two = log_of(folder / 'out/one'), log_of(folder / 'out/two')
    assert len(one) == 4
    assert all(abs(float(a['loss']) - float(b['loss'])) < 1e-4 for a, b in zip(one, two, strict=True))


def test_train_checkpoints_gradients_without_changing_a_number_and_may_write_nothing(folder):
    losses = []
    for args in (['--gradient_checkpointing'], []):
        process = done(run('train.py', *TINY_RUN, '--out_dir=', '--dropout=0.1', *args, cwd=folder))
        losses.append(re.findall(r'loss (\d\.\d+)  best (\d\.\d+)', process.stdout))
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert not [name for name in os.listdir(folder) if name.endswith('.pt')]


def test_train_goes_on_eagerly_without_a_compiler(folder, tmp_path):
    process = spawn('train.py', *TINY_RUN, '--out_dir=out/eager', '--compile=True', cwd=folder, environment={
        'CXX': '/nonexistent', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path)})
    status, _, error = ended(process, 200)
    assert status == 0 and error.count('going on eagerly') == 1, error
    assert log_of(folder / 'out/eager') == log_of(folder / 'out/tiny')


def test_train_stops_by_time_and_by_patience(folder):
    args = ['--max_iters=10000000', '--eval_interval=50', '--log_interval=0', '--checkpoint_interval=0']
    process = tiny_run(folder, 'minutes', *args, '--max_minutes=0.02')
    assert '0.02 minutes over' in process.stdout
    process = tiny_run(folder, 'patience', *args, '--learning_rate=0', '--min_lr=0', '--patience=2')
    assert 'in 2 evaluations' in process.stdout and load(folder / 'out/patience')[1]['step'] == 150


def test_train_saves_after_ten_minutes(folder, monkeypatch):
    """By a clock on which a step takes minutes; an interval of 0 means never."""
    real, clock, kinds = model.save, itertools.count(0, 300), []

    def save(*args, **facts):
        kinds.append(facts.get('kind', 'model'))
        real(*args, **facts)
    monkeypatch.setattr(model, 'save', save)
    monkeypatch.setattr(time, 'time', lambda: next(clock))
    for interval in 10**6, 0:
        tiny_run(folder, f'clock_{interval}', f'--checkpoint_interval={interval}', '--eval_interval=0')
    saves = kinds.index('model')
    assert saves > 6 and kinds == ['checkpoint'] * saves + ['model', 'checkpoint', 'model']
    same_run(folder / f'out/clock_{10**6}', folder / 'out/clock_0')


def test_train_stops_at_the_threshold(folder):
    process = tiny_run(folder, 'threshold', '--loss_threshold=1.5', '--max_iters=5000', '--warmup_iters=1',
                       '--learning_rate=1e-2', '--min_lr=1e-2', '--log_interval=0', '--eval_interval=0')
    state = read(folder / 'out/threshold/ckpt.pt')['state']
    assert 'under 1.5' in process.stdout and state['step'] % 10 == 0
    assert sum(state['recent']) / len(state['recent']) < 1.5


def test_train_keeps_the_last_checkpoint_when_it_blows_up(folder):
    args = ['--learning_rate=999', '--min_lr=999', '--warmup_iters=0', '--grad_clip=0', '--weight_decay=900',
            '--max_iters=4000', '--checkpoint_interval=1', '--log_interval=0', '--eval_interval=0']
    process = run('train.py', *TINY_RUN, '--out_dir=out/nan', *args, cwd=folder)
    one_line(process, 1, 'diverged', '--learning_rate')
    assert all(p.isfinite().all() for p in read(folder / 'out/nan/ckpt.pt')['model'].values())


# -- train.py: stopped and resumed ---------------------------------------------------------------------------

@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_train_resumed_equals_the_whole_run(folder, optimizer):
    """Weights, moments, windows and dropout, bit for bit."""
    whole, half = f'whole_{optimizer}', f'half_{optimizer}'
    args = [f'--optimizer={optimizer}', '--dropout=0.3', '--gradient_accumulation_steps=2',
            '--lr_decay_iters=20']
    tiny_run(folder, whole, *args)
    tiny_run(folder, half, *args, '--max_iters=10')
    done(run('train.py', f'--out_dir=out/{half}', '--init_from=resume', '--max_iters=20', cwd=folder))
    same_run(folder / 'out' / whole, folder / 'out' / half)


def test_train_killed_resumes_to_the_bit(folder):
    """Beside a run that was never stopped; for the other signals see test_train_saves_at_a_signal."""
    args = ['--max_iters=300', '--dropout=0.1', '--eval_interval=100', '--checkpoint_interval=20']
    tiny_run(folder, 'whole', *args)
    process = spawn('train.py', *TINY_RUN, *args, '--out_dir=out/cut', '--init_from=auto', cwd=folder)
    wait_for_step(process, 50)
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL
    done(run('train.py', '--out_dir=out/cut', '--init_from=resume', cwd=folder))
    same_run(folder / 'out/whole', folder / 'out/cut')


PHASES = {  # when a signal comes: in which call of what, and what the run says
    'before the loop': (model, 'device_name', 1, ''),
    'in a step': (GPT, 'forward', 3, 'at step 2'),
    'in an evaluation': (GPT, 'forward', 12, 'at step 10'),
    'while saving': (model, 'save', 1, 'at step 5'),
    'in the final evaluation': (sys.modules['prepare'], 'bits_per_nat', 2, '')}


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGHUP], ids=['SIGINT', 'SIGHUP'])
@pytest.mark.parametrize('phase', PHASES)
def test_train_saves_at_a_signal(folder, phase, number, monkeypatch):
    """The run ends with 130 or 129, and goes on to the bit; for SIGTERM see the ranks."""
    owner, name, call, words = PHASES[phase]
    real, calls = getattr(owner, name), []

    def signalling(*args, **more):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return real(*args, **more)
    out = f"signal_{int(number)}_{phase.replace(' ', '_')}"
    args = [*TINY_RUN, f'--out_dir=out/{out}', '--init_from=auto']
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalling)
        process = run('train.py', *args, cwd=folder)
    assert process.returncode == 128 + number and len(calls) >= call, process.stderr
    assert words in process.stderr and 'Traceback' not in process.stderr, process.stderr
    done(run('train.py', *args, cwd=folder))
    same_run(folder / 'out/tiny', folder / 'out' / out)


def test_train_saves_when_its_terminal_closes(folder, monkeypatch):
    """SIGHUP comes twice then, and stdout takes no more lines."""
    real, calls = GPT.forward, []

    def closing(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
            print('to nobody')
        return real(*args, **more)
    with monkeypatch.context() as patch:
        patch.setattr(GPT, 'forward', closing)
        process = run('train.py', *TINY_RUN, '--out_dir=out/hangup', cwd=folder)
    assert process.returncode == 129 and 'SIGHUP at step 2' in process.stderr, process.stderr
    assert 'to nobody' not in process.stdout and read(folder / 'out/hangup/ckpt.pt')['step'] == 2


def test_train_says_that_the_text_of_its_data_has_changed(folder):
    (folder / 'edited.txt').write_text(corpus(3000))
    args = [*TINY_RUN, '--dataset=edited', '--input=edited.txt', '--out_dir=', '--max_iters=2']
    done(run('train.py', *args, cwd=folder))
    (folder / 'edited.txt').write_text(corpus(3001))
    one_line(run('train.py', *args, cwd=folder), 2, 'input edited.txt has changed')


@pytest.mark.parametrize('failing', ['the first two', 'ckpt.pt'])
def test_train_goes_on_where_a_file_cannot_be_written(folder, failing, monkeypatch):
    """The next interval tries again; exit 1 if the last state is not on the disk."""
    real, calls = model.save, []

    def full(path, *args, **more):
        calls.append(path)
        if failing in path or failing == 'the first two' and len(calls) <= 2:
            raise OSError(f'{path} could not be written (No space left on device)')
        return real(path, *args, **more)
    monkeypatch.setattr(model, 'save', full)
    out = f"full_{failing[:4].strip()}"
    process = run('train.py', *TINY_RUN, f'--out_dir=out/{out}', cwd=folder)
    assert 'step 5: ' in process.stderr and 'No space left' in process.stderr
    if failing == 'ckpt.pt':
        assert process.returncode == 1 and 'ckpt.pt could not be written to' in process.stderr
        assert load(folder / 'out' / out)[1]['step'] == 20
    else:
        done(process)
        same_run(folder / 'out/tiny', folder / 'out' / out)


@pytest.mark.parametrize('failing', ['log.csv', 'best.pt'])
def test_train_resumed_writes_what_could_not_be_written(folder, failing, monkeypatch):
    """To the bit: the rows that log.csv lacks, and the last evaluation's weights if they are the best."""
    out, real = folder / 'out' / f'lacks_{failing[:4]}', open

    def full(path, mode='r', *args, **more):
        if failing in str(path) and mode != 'rb':
            raise OSError(28, 'No space left on device', path)
        return real(path, mode, *args, **more)
    args = [*TINY_RUN, f'--out_dir={out}', '--init_from=auto']
    with monkeypatch.context() as patch:
        patch.setattr('builtins.open', full)
        process = run('train.py', *args, cwd=folder)
    assert process.returncode == 1 and f'{failing} could not be written to' in process.stderr
    assert not (out / failing).exists()
    done(run('train.py', *args, cwd=folder))
    same_run(folder / 'out/tiny', out)
    best, ours = read(folder / 'out/tiny/best.pt'), read(out / 'best.pt')
    assert best['step'] == ours['step'] == 20
    assert all(torch.equal(w, ours['model'][name]) for name, w in best['model'].items())


def test_train_deploys_no_older_best_than_the_one_it_reports(folder):
    """The best weights, of step 20, could not be written, and best.pt has those of step 10."""
    args = ['--out_dir=out/stale', '--init_from=auto', '--patience=9']
    done(run('train.py', *TINY_RUN, *args, '--max_iters=10', cwd=folder))
    os.mkdir(folder / 'out/stale/best.pt.tmp')
    process = run('train.py', *TINY_RUN, *args, '--max_iters=22', cwd=folder)
    assert process.returncode == 1 and 'best.pt could not be written to' in process.stderr
    os.rmdir(folder / 'out/stale/best.pt.tmp')
    process = done(run('train.py', *TINY_RUN, *args, '--max_iters=24', cwd=folder))
    assert 'at step 20\n' in process.stdout and read(folder / 'out/stale/best.pt')['step'] == 10
    last, deployed = (read(folder / f'out/stale/{name}.pt')['model'] for name in ('ckpt', 'model'))
    assert all(torch.equal(w, last[name]) for name, w in deployed.items())


def test_train_looks_into_its_folder_once_it_has_the_lock(folder, monkeypatch):
    """Another run of the same folder may save and end just before this one gets the lock."""
    def late(path):
        shutil.copytree(folder / 'out/tiny', path)
        return FolderLock(path)
    monkeypatch.setattr('prepare.FolderLock', late)
    one_line(run('train.py', *TINY_RUN, '--out_dir=out/late', cwd=folder), 1, 'has a run')
    assert contents_of(folder / 'out/late') == contents_of(folder / 'out/tiny')


def test_train_replaces_no_data_of_which_a_file_is_lost(folder):
    shutil.copytree(folder / 'data/tiny', folder / 'data/lost')
    os.remove(folder / 'data/lost/train.bin')
    before = contents_of(folder / 'data/lost')
    process = run('train.py', *TINY_RUN, '--dataset=lost', '--out_dir=', cwd=folder)
    one_line(process, 1, 'data/lost: has data, or a part of it', 'prepare it again')
    assert contents_of(folder / 'data/lost') == before


def test_train_resumed_refuses_other_data_and_writes_the_best_again(folder):
    """The weights of a checkpoint are the best's if its step is."""
    shutil.copytree(folder / 'out/tiny', folder / 'out/again')
    os.remove(folder / 'out/again/best.pt')
    args = ['--out_dir=out/again', '--init_from=resume', '--max_iters=20']
    done(run('train.py', *args, cwd=folder))
    best, ours = read(folder / 'out/tiny/best.pt'), read(folder / 'out/again/best.pt')
    assert best['step'] == ours['step'] and best['losses'] == ours['losses']
    assert all(torch.equal(w, ours['model'][name]) for name, w in best['model'].items())
    checkpoint = read(folder / 'out/again/ckpt.pt')
    checkpoint['data']['val_fraction'] = 0.5
    torch.save(checkpoint, folder / 'out/again/ckpt.pt')
    one_line(run('train.py', *args, cwd=folder), 1, "data/tiny is not the model's text")


def test_train_looks_at_the_disks_space_before_the_first_step(folder, monkeypatch):
    """A run's old files count as room, and are kept where that is not enough."""
    tiny_run(folder, 'room')
    before = contents_of(folder / 'out/room')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=1000))
    for out in 'no_room', 'room':
        args = [*TINY_RUN, f'--out_dir=out/{out}', '--overwrite', '--n_layer=20']
        one_line(run('train.py', *args, cwd=folder), 1, f'out/{out}: 0 MB are free')
    assert contents_of(folder / 'out/room') == before
    tiny_run(folder, 'room', '--overwrite')
    done(run('train.py', *TINY_RUN, '--out_dir=', cwd=folder))


def test_train_ends_at_a_second_signal_inside_a_long_call(folder):
    code = ("import runpy, sys, time, model\n"
            "def forward(*args):\n    print('forward', flush=True)\n    time.sleep(0.5)\n    time.sleep(60)\n"
            "model.GPT.forward = forward\n"
            f"runpy.run_path({os.path.join(HERE, 'train.py')!r}, run_name='__main__')")
    process = start(['-c', code, *TINY_RUN, '--out_dir=out/second'], folder, {'PYTHONPATH': HERE})
    while 'forward' not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert ended(process, 10)[0] == -signal.SIGINT


def test_train_resumed_takes_new_settings_and_reports_all_of_the_run(folder):
    shutil.copytree(folder / 'out/tiny', folder / 'out/more')
    process = done(run('train.py', '--out_dir=out/more', '--init_from=resume', '--max_iters=23',
                       '--weight_decay=0.5', '--log_interval=0', '--eval_interval=0', cwd=folder))
    now = read(folder / 'out/more/ckpt.pt')
    assert now['optimizers'][0]['param_groups'][0]['weight_decay'] == 0.5 and now['state']['seconds'] > 0
    recent = now['state']['recent']
    assert f'{sum(recent) / len(recent):.4f} at last' in process.stdout  # the last 3 steps too


# -- train.py: from another model ----------------------------------------------------------------------------

def test_train_from_another_model_keeps_the_best(folder):
    """From a model that knows its text, at a rate that ruins it: best.pt and model.pt are the parent."""
    args = ['--dataset=wide', '--n_embd=128', '--max_iters=200', '--learning_rate=5e-3', '--warmup_iters=1',
            '--val_fraction=0.2', '--eval_interval=50']
    process = tiny_run(folder, 'parent', *args)
    process = tiny_run(folder, 'ruined', *args, '--init_from=out/parent', '--learning_rate=1', '--min_lr=1',
                       '--grad_clip=0', '--eval_interval=2', '--eval_iters=50', '--patience=2')
    parent, best, final = (load(folder / f'out/{file}.pt')[0]
                           for file in ('parent/model', 'ruined/best', 'ruined/model'))
    losses = [split_loss(parent, tokens, 16) for tokens in load_data(folder / 'data/wide')[:2]]
    assert f'evaluation at step 0: train {losses[0]:.4f}, validation {losses[1]:.4f}' in process.stdout
    assert 'no better validation loss in 2 evaluations' in process.stdout
    assert f"at step 0, kept in {os.path.join('out/ruined', 'best.pt')}" in process.stdout
    for other in (best, final):
        assert all(torch.equal(a, b) for a, b in zip(parent.parameters(), other.parameters()))


def test_train_from_another_model_keeps_its_characters_and_goes_on(folder):
    (folder / 'mine.txt').write_text('The cat sat.\n' * 40)
    args = ['--init_from=auto:out/tiny', '--input=mine.txt', '--dataset=mine', '--out_dir=out/mine',
            '--batch_size=4', '--eval_interval=1', '--log_interval=1']
    for steps, words in ((2, 'out/tiny, from step 0 to step 2'), (4, 'resume, from step 2 to step 4')):
        process = done(run('train.py', *args, f'--max_iters={steps}', cwd=folder))
        assert words in process.stdout
    assert load(folder / 'out/mine')[1]['tokenizer'] == load(folder / 'out/tiny')[1]['tokenizer']
    (folder / 'mine.txt').write_text('The cat @')
    process = run('train.py', *args, '--out_dir=out/refused', '--dataset=refused', cwd=folder)
    one_line(process, 1, "'@' is not in")
    assert not list((folder / 'data').glob('refused/*'))


def test_train_from_a_hub_id_in_the_cache(folder, tmp_path, monkeypatch, repository='gpt2'):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    out = f'out/of_{os.path.basename(repository)}'
    args = ['config/finetune.py', f'--init_from={repository}', f'--out_dir={out}', '--dataset=bpe',
            '--seq_len=16', '--max_iters=2', '--batch_size=2']
    process = run('train.py', *args, cwd=folder)
    one_line(process, 1, repository, 'not to be had from the Hub', 'connect')
    cache = tmp_path / f"models--{repository.replace('/', '--')}"
    (cache / 'refs').mkdir(parents=True)
    (cache / 'refs/main').write_text('1' * 40)
    save_hugging_face(cache / 'snapshots' / ('1' * 40))
    process = done(run('train.py', *args, '--eval_interval=1', '--final_eval_tokens=100', cwd=folder))
    assert 'evaluation at step 0' in process.stdout and 'parameters, step 0' in process.stderr
    done(run('quantize.py', f'--checkpoint={repository}', '--eval_tokens=100', cwd=folder))
    assert (folder / 'out' / os.path.basename(repository) / 'model_int8.pt').exists()


def test_train_takes_nanogpts_bins(folder):
    """Without a meta.json the ids are GPT-2's."""
    os.makedirs(folder / 'data/nano')
    np.arange(200, dtype='<u2').tofile(folder / 'data/nano/train.bin')
    process = done(run('train.py', *TINY_MODEL, '--dataset=nano', '--out_dir=out/nano', '--batch_size=4',
                       '--max_iters=2', cwd=folder))
    assert 'the training split stands in' in process.stdout
    assert load(folder / 'out/nano')[1]['tokenizer'] == GPT2


# -- train.py: several ranks ---------------------------------------------------------------------------------

@pytest.mark.parametrize('ranks, share', [
    (4, '--batch_size=8'),
    (2, '--batch_size=2 --gradient_accumulation_steps=4 --n_layer=3 --optimizer=muon')],
    ids=['batch', 'muon'])
def test_ranks_see_what_one_process_sees(folder, ranks, share):
    args = [*TINY_RUN, '--log_interval=1', '--max_iters=10', '--overwrite', *share.split()]
    done(run('train.py', *args, '--out_dir=out/one_rank', cwd=folder))
    status, _, error = ended(torchrun(ranks, *args, '--out_dir=out/ranks', cwd=folder))
    assert status == 0, error
    for a, b in zip(log_of(folder / 'out/one_rank'), log_of(folder / 'out/ranks'), strict=True):
        assert all(abs(float(a[key] or 0) - float(b[key] or 0)) < 1e-4 for key in ('loss', 'val_loss'))


def test_ranks_of_nodes_that_would_not_meet_again_are_refused(folder, monkeypatch):
    for name, value in dict(WORLD_SIZE=2, GROUP_WORLD_SIZE=2, TORCHELASTIC_MAX_RESTARTS=1,
                            TORCHELASTIC_USE_AGENT_STORE=True).items():
        monkeypatch.setenv(name, str(value))  # as torchrun sets them
    one_line(run('train.py', *TINY_RUN, '--out_dir=out/none', cwd=folder), 2,
             'TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1', '--max-restarts=0')


def test_ranks_that_cannot_share_are_refused(folder, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '3')  # as torchrun sets it
    process = run('train.py', *TINY_RUN, '--out_dir=out/none', cwd=folder)
    one_line(process, 2, '3 ranks cannot share batch_size 4')
    assert not list((folder / 'out').glob('none/*'))


@pytest.mark.skipif(not os.path.exists('/proc/self/task'), reason='finds the ranks through /proc')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL], ids=['SIGTERM', 'SIGKILL'])
def test_ranks_end_together_and_go_on(folder, number):
    """SIGTERM to one stops all, saved; after SIGKILL torchrun starts all again, and the run goes on."""
    out, killed = f'out/end_{int(number)}', number == signal.SIGKILL
    process = torchrun(2, *TINY_RUN, '--init_from=auto', f'--out_dir={out}', '--checkpoint_interval=20',
                       '--log_interval=20', '--eval_interval=0', f'--max_iters={200 if killed else 10**6}',
                       cwd=folder, restarts=int(killed))
    wait_for_step(process, 40)
    with open(f'/proc/{process.pid}/task/{process.pid}/children', encoding='utf-8') as f:
        os.kill(int(f.read().split()[1]), number)  # rank 1
    status, _, error = ended(process)
    checkpoint = read(folder / out / 'ckpt.pt')
    if killed:
        assert status == 0 and checkpoint['step'] == 200, error
        assert [int(row['step']) for row in log_of(folder / out)] == list(range(20, 201, 20))
    else:
        assert status != 0 and error.count('SIGTERM at step') == 1 and 'exitcode: 143' in error, error


# -- what is published ---------------------------------------------------------------------------------------

def pinned():
    """{package: version} of requirements.txt."""
    with open(f'{HERE}/requirements.txt', encoding='utf-8') as f:
        return dict(line.strip().split('==') for line in f)


def test_readme_begins_with_the_card_of_a_space():
    packaging = pytest.importorskip('packaging.specifiers', reason='pip install gradio')
    with open(f'{HERE}/README.md', encoding='utf-8') as f:
        card = dict(line.split(': ', 1) for line in f.read().split('---\n')[1].splitlines())
    assert (card['sdk'], card['sdk_version']) == ('gradio', pinned()['gradio'])
    assert os.path.isfile(f"{HERE}/{card['app_file']}") and len(card['short_description']) <= 60
    assert {card['colorFrom'], card['colorTo']} < set('red yellow green blue indigo purple pink gray'.split())
    for package in pinned():  # without python_version, a Space has 3.10
        wanted = importlib.metadata.metadata(package)['Requires-Python']
        assert packaging.SpecifierSet(wanted).contains(card.get('python_version', '3.10').strip("'")), package


def test_requirements_bring_all_that_the_scripts_import():
    brought, wanted, imported = set(), list(pinned()), set()
    while wanted:
        name = re.match(r'[\w.-]+', wanted.pop())[0].lower().replace('_', '-')
        if name not in brought:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # another system's
                wanted += [line for line in importlib.metadata.requires(name) or () if 'extra ==' not in line]
                brought.add(name)
    for script in ('model', 'train', 'app', 'prepare', 'quantize', 'config/__init__', 'sample'):
        with open(f'{HERE}/{script}.py', encoding='utf-8') as f:
            for node in ast.walk(ast.parse(f.read())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                imported.update(name.split('.')[0] for name in names)
    ours = {'config', 'model', 'prepare', 'train'}
    extra = {'transformers', 'safetensors', 'tokenizers'}  # the README: pip install transformers
    packages = importlib.metadata.packages_distributions()
    for name in imported - sys.stdlib_module_names - ours - extra:
        assert {package.lower().replace('_', '-') for package in packages[name]} & brought, name


# -- sample.py -----------------------------------------------------------------------------------------------

def test_sample_prints_the_text_alone(folder):
    args = ['--checkpoint=out/tiny', '--start=The cat', '--max_new_tokens=30']
    status, out, error = ended(spawn('sample.py', *args, '--num_samples=2', cwd=folder))
    texts = out.split('\n---------------\n')
    assert status == 0 and len(texts) == 2 and all(text.startswith('The cat') for text in texts), error
    assert 'tokens/s' in error and 'parameters, step' in error and '\ufffd' not in out
    assert run('sample.py', *args, '--num_samples=2', cwd=folder).stdout == out
    assert run('sample.py', *args, '--seed=1338', cwd=folder).stdout == texts[1]  # text i is that of seed + i
    many = run('sample.py', *args, '--num_samples=40', cwd=folder).stdout
    assert many.startswith(out.rstrip('\n')) and many.count('The cat') == 40


def test_sample_takes_a_prompt_from_a_file_or_nothing(folder):
    (folder / 'prompt.txt').write_text('日本 🎭', encoding='utf-8')

    def sample(*args):
        return done(run('sample.py', '--checkpoint=out/tiny', '--max_new_tokens=5', *args, cwd=folder)).stdout
    text = sample('--start=FILE:prompt.txt', '--temperature=0')
    assert text.startswith('日本 🎭') and len(text) == len('日本 🎭') + 5 + 1
    sample('--checkpoint=out/tiny/best.pt')  # an empty prompt
    sample('--start=cat.<|endoftext|>', '--temperature=1e-300')
    piped = spawn('sample.py', '--checkpoint=out/tiny', '--max_new_tokens=5', '--start=-', cwd=folder,
                  stdin=subprocess.PIPE)
    assert ended(piped, stdin='日本')[1] == sample('--start=日本')


def test_sample_with_drafts_prints_the_same_text(folder):
    args = ['--checkpoint=out/tiny', '--start=The cat', '--max_new_tokens=60', '--temperature=0.3']
    plain, drafted = (run('sample.py', *args, *more, cwd=folder) for more in ([], ['--drafts=True']))
    assert drafted.stdout == plain.stdout and plain.stdout
    assert 'a pass' not in plain.stderr  # of characters, four are too few for 'auto'
    assert ' tokens a pass' in drafted.stderr
    os.rename(folder / 'data', folder / 'gone')
    try:
        process = run('sample.py', *args, '--drafts=True', cwd=folder)
        one_line(process, 2, 'sample.py: --drafts=True', 'leave it out')
        assert run('sample.py', *args, '--drafts=auto', cwd=folder).stdout == plain.stdout
    finally:
        os.rename(folder / 'gone', folder / 'data')


def test_sample_asks_for_one_prompt_after_the_other(folder):
    process = done(run('sample.py', '--interactive', '--checkpoint=out/tiny', '--stop=t', '--temperature=0.5',
                       '--num_samples=2', cwd=folder, stdin='The \n@\nmat; ' + 'cat ' * 20))
    assert process.stderr.count('Prompt> ') == 4 and "'@' is not in" in process.stderr
    assert re.search(r'\b85\b', process.stderr)  # its length, which is more than the model sees
    first, _, second, _ = re.split('\n---------------\n|\n+(?=mat)', process.stdout)
    assert first.startswith('The ') and second.startswith('mat; cat ') and 't' not in first[4:]


def test_sample_leaves_after_a_prompt_that_was_all_of_stdin(folder):
    process = spawn('sample.py', '--checkpoint=out/tiny', '--interactive', '--start=-', cwd=folder,
                    stdin=subprocess.PIPE)
    process.stdin.write('The cat')
    process.stdin.close()
    text, error = process.stdout.read(), process.stderr.read()
    assert process.wait(60) == 0 and text.startswith('The cat') and 'Errno' not in error, error


def test_sample_stops_a_text_at_ctrl_c(folder):
    process = spawn('sample.py', '--checkpoint=out/tiny', '--interactive', '--max_new_tokens=10000000',
                    cwd=folder, stdin=subprocess.PIPE)
    process.stdin.write('The cat\n')
    process.stdin.flush()
    assert process.stdout.read(20).startswith('The cat')
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # at the prompt again
    process.send_signal(signal.SIGINT)
    status, _, error = ended(process)
    assert status == 130 and 'stopped' in error and 'Traceback' not in error, error


@pytest.mark.parametrize('args, status, words', [
    ('--tempratur=1', 2, 'temperature'),
    ('--temperature=-1', 2, 'at least 0'),
    ('--temperature=nan', 2, 'nan'),
    ('--top_k=x', 2, 'int'),
    ('--top_p=1.5', 2, 'at most 1'),
    ('--min_p=-1', 2, 'at least 0'),
    ('--repetition_penalty=0', 2, 'at least'),
    ('--context=17', 2, '16'),
    ('--device=tpu', 2, 'tpu'),
    ('--checkpoint=none', 1, 'quickstart'),
    ('--checkpoint=input.txt', 1, 'damaged'),
    ('--start=FILE:none.txt', 1, 'none.txt'),
    ('--start=FILE:latin.txt', 1, 'not UTF-8'),
    ('--start=@', 1, "'@'")])
def test_sample_refuses_in_one_line(folder, args, status, words):
    (folder / 'latin.txt').write_bytes('é'.encode('latin-1'))
    process = run('sample.py', '--checkpoint=out/tiny', args, cwd=folder)
    one_line(process, status, 'sample.py: ', words)
    assert process.stdout == ''


# -- quantize.py ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['int8', 'int4', 'bfloat16', 'float32'])
def test_quantize_as_a_user_runs_it(folder, kind):
    small = shutil.copytree(folder / 'out/tiny', folder / 'out/small', dirs_exist_ok=True)
    process = done(run('quantize.py', '--checkpoint=out/small/model.pt', f'--dtype={kind}', '--sidecars',
                       cwd=folder))
    for words in ('size, MB', 'loss', 'tokens/s, one text', 'tokens/s, eight', 'data/tiny, validation',
                  f'model_{kind}.pt'):
        assert words in process.stdout, process.stdout
    gpt, meta = load(small / f'model_{kind}.pt')
    assert meta['step'] == 20 and 'quantize.py' in meta['made_by'] and meta['trained_context'] == 16
    assert gpt.config.quantized == (kind if 'int' in kind else '')
    done(run('sample.py', f'--checkpoint=out/small/model_{kind}.pt', '--max_new_tokens=5', cwd=folder))
    assert json.loads((small / 'config.json').read_text())['n_embd'] == 16
    about = json.loads((small / 'meta.json').read_text(encoding='utf-8'))
    assert about['tokenizer']['name'] == 'char' and about['dtype'] == kind


@pytest.mark.parametrize('args, status, words', [
    ('--dtype=int7', 2, 'int8, int4'),
    ('--checkpoint=none', 1, 'none'),
    ('--dataset=typo', 2, 'typo'),
    ('--format=gguf', 2, 'folio, hf'),
    ('--format=hf --dtype=int8', 2, 'float32 or bfloat16'),
    ('--format=hf --sidecars', 2, "Hugging Face's")])
def test_quantize_refuses_in_one_line(folder, args, status, words):
    process = run('quantize.py', '--checkpoint=out/tiny', *args.split(), cwd=folder)
    process.stderr = process.stderr.replace('out/tiny/model.pt\n', '')
    one_line(process, status, 'quantize.py: ', words)
    assert not (folder / 'out/tiny/config.json').exists()


def test_quantize_and_train_refuse_what_is_quantized(folder):
    shutil.copytree(folder / 'out/tiny', folder / 'out/twice')
    for name in ('model', 'best'):
        done(run('quantize.py', f'--checkpoint=out/twice/{name}.pt', cwd=folder))
        assert (folder / f'out/twice/{name}_int8.pt').exists()
    process = run('quantize.py', '--checkpoint=out/twice/model_int8.pt', cwd=folder)
    assert process.returncode == 1 and 'int8 already' in process.stderr and 'Traceback' not in process.stderr
    args = ['--init_from=out/twice/model_int8.pt', '--out_dir=out/no']
    process = run('train.py', *TINY_RUN, *args, cwd=folder)
    assert process.returncode == 1 and 'cannot be trained' in process.stderr


@pytest.mark.parametrize('kind', ['int8', 'int4'])
@pytest.mark.parametrize('name, shape, value, words', [
    ('h.0.mlp.c_fc.weight', (3, 32), math.nan, 'not finite'),
    ('h.0.mlp.c_fc.weight', (3, 32), math.inf, 'not finite'),
    ('ln_f.weight', (32,), 1e5, 'too large')], ids=['nan', 'inf', 'large'])
def test_convert_refuses_weights_that_do_not_fit(kind, name, shape, value, words):
    with pytest.raises(ValueError, match=words):
        convert({name: torch.full(shape, value)}, kind)


def test_quantize_writes_nothing_where_too_much_is_lost(folder):
    tiny_run(folder, 'lossy', '--max_iters=300', '--learning_rate=1e-2', '--eval_interval=0',
             '--checkpoint_interval=0')
    path = folder / 'out/lossy/model.pt'
    contents = read(path)
    weights = contents['model']
    for norm, matrix in (('ln_1', 'attn.c_attn'), ('ln_2', 'mlp.c_fc')):
        for name in ('weight', 'bias'):  # the same function, but one weight takes its group's bits
            weights[f'h.0.{norm}.{name}'][0] /= 1000
        weights[f'h.0.{matrix}.weight'][:, 0] *= 1000
    torch.save(contents, path)
    process = run('quantize.py', f'--checkpoint={path}', '--dtype=int4', '--max_loss_increase=0', cwd=folder)
    assert process.returncode == 1, process.stdout
    for words in ('int4 raises the loss', '--max_loss_increase=0', 'a finer --dtype'):
        assert words in process.stderr
    assert not (folder / 'out/lossy/model_int4.pt').exists()


@pytest.mark.parametrize('shape, dtype', [
    (WIDE, 'bfloat16'),
    (dict(SMALL, vocab_size=65, bias=False), 'float32'),
    (dict(SMALL, vocab_size=600), 'float32')], ids=['gpt2, bfloat16', 'char, no bias', 'bpe'])
def test_quantize_to_hugging_face_and_back(tmp_path, shape, dtype):
    transformers = pytest.importorskip('transformers', reason='pip install transformers')
    torch.manual_seed(4)
    gpt = GPT(GPTConfig(**shape)).eval()
    for p in gpt.parameters():
        p.data += 0.1 * torch.randn_like(p)
    V, gpt.trained_context = gpt.config.vocab_size, 48
    tokenizer = CharTokenizer(map(chr, range(10, 75))) if V == 65 else get_tokenizer(
        GPT2 if V == 50257 else learn_tokenizer([corpus(100_000)], 1, V))
    save_gpt(tmp_path / 'model.pt', gpt, tokenizer.meta, 7, losses={'train': 2.0}, dataset='none',
             made_by='a test')
    args = ['--checkpoint=model.pt', '--format=hf', f'--dtype={dtype}']
    process = done(run('quantize.py', *args, cwd=tmp_path))
    assert 'hf' in process.stdout

    again, meta = load(tmp_path / 'hf')
    for name, w in again.state_dict().items():
        assert torch.equal(w[:V], gpt.state_dict()[name][:V].to(getattr(torch, dtype)).float()), name
    assert again.config == gpt.config and meta['tokenizer'] == tokenizer.meta and 'a test' in meta['made_by']
    assert (meta['step'], meta['losses'], meta['trained_context']) == (7, {'train': 2.0}, 48)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', dtype=torch.float32).eval()
    assert made.lm_head.weight is made.transformer.wte.weight and len(made.lm_head.weight) == V
    same_network(again, made, torch.randint(V, (2, 20)))

    words = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    for seed in range(20):
        text = random_text(random.Random(seed), 200)
        if V == 65:
            text = ''.join(c for c in text * 3 if c in tokenizer.characters)
        ids = words(text).input_ids
        assert ids == tokenizer.encode(text, special_tokens=V != 65) and words.decode(ids) == text
    process = done(run('sample.py', '--checkpoint=hf', '--start=<', '--max_new_tokens=4', cwd=tmp_path))
    assert process.stdout.startswith('<')


def test_write_hugging_face_keeps_an_older_export_when_it_fails(gpt, tmp_path, monkeypatch):
    transformers = pytest.importorskip('transformers', reason='pip install transformers')
    facts = dict(tokenizer={'name': 'char', 'characters': 'abc', 'vocab_size': 3}, trained_context=8)
    config = dataclasses.replace(gpt.config, vocab_size=3)
    weights = dict(gpt.state_dict(), **{'wte.weight': gpt.wte.weight[:3].detach().clone()})
    write_hugging_face(tmp_path / 'hf', config, weights, 'float32', facts)
    before = contents_of(tmp_path / 'hf')

    def full(*args):
        raise Exception('No space left on device (os error 28)')  # as tokenizers does
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, 'save_pretrained', full)
    with pytest.raises(OSError, match='hf could not be written: No space left'):
        write_hugging_face(tmp_path / 'hf', config, weights, 'bfloat16', facts)
    assert contents_of(tmp_path / 'hf') == before


def test_quantize_leaves_nothing_of_an_export_before(folder):
    shutil.copytree(folder / 'out/tiny', folder / 'out/export')
    (folder / 'out/export/hf').mkdir()
    for name in ('model-00001-of-00002.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin',
                 'merges.txt', 'mine.txt'):
        (folder / 'out/export/hf' / name).write_text('{}')
    done(run('quantize.py', '--format=hf', '--checkpoint=out/export', cwd=folder))
    assert contents_of(folder / 'out/export/hf').keys() == {
        'mine.txt', 'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
        'tokenizer_config.json'}
    if os.name == 'posix':
        assert (folder / 'out/export/hf/model.safetensors').stat().st_mode & 0o444 == 0o444


def test_measure_samples_the_int8_file(folder, tmp_path):
    """Part C of .ci/measure trains, quantizes and samples: here a tiny model, in a folder of its own."""
    shutil.copy(folder / 'input.txt', tmp_path)
    for name in ('.ci', 'train.py', 'quantize.py', 'sample.py'):
        (tmp_path / name).symlink_to(os.path.join(HERE, name))
    settings = [*TINY_MODEL[:3], '--batch_size=2', '--seq_len=16', '--max_iters=2', '--final_eval_tokens=200']
    process = subprocess.run(
        ['bash', tmp_path / '.ci/measure', 'C', '--', *settings], capture_output=True, text=True, timeout=200,
        env={**os.environ, 'PYTHON': sys.executable})
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(r'C/model_int8\.pt: [\d,]+ parameters', process.stderr)
    assert process.stdout.count('To be') == 3


# -- app.py --------------------------------------------------------------------------------------------------

def test_page_api_streams_and_refuses(page, folder):
    from gradio_client import Client
    client = Client(page, verbose=False)
    asked = dict(prompt='The cat', max_new_tokens=200, seed=3, num_samples=2, api_name='/generate')
    updates = list(client.submit(**asked))
    texts = updates[-1]
    assert len(texts) == 2 and all(text.startswith('The cat') for text in texts) and len(updates) > 1
    assert all(new.startswith(old) for old, new in zip(updates[0], texts)) and len(texts[0]) == 7 + 200
    assert client.predict(**asked) == texts
    sampled = run('sample.py', '--checkpoint=served', '--start=The cat', '--seed=3', '--num_samples=2',
                  cwd=folder)
    assert sampled.stdout == '\n---------------\n'.join(texts) + '\n'
    assert len(client.predict('The cat', 10**9, api_name='/generate')[0]) == 7 + 15000  # at most max_tokens
    for wrong, words in ((dict(prompt=None), 'must be a text'),
                         (dict(prompt='x' * 501), 'at most 500'),
                         (dict(prompt='@'), "'@' is not in"),
                         (dict(prompt='The', max_new_tokens='many'), 'New tokens'),
                         (dict(prompt='The', top_p=[1]), 'Top-p'),
                         (dict(prompt='The', seed='/etc/passwd'), 'Seed')):
        with pytest.raises(Exception, match=words):
            client.predict(**wrong, api_name='/generate')


def test_page_api_takes_the_readmes_calls(page):
    """They leave values out."""
    from gradio_client import Client
    client = Client(page, verbose=False)
    assert len(client.predict('The', max_new_tokens=50, api_name='/generate')[0]) == 53
    assert list(client.submit('The', num_samples=2, seed=1, api_name='/generate'))[-1][1].startswith('The')
    body = json.dumps({'prompt': 'The', 'max_new_tokens': 50}).encode()
    request = urllib.request.Request(f'{page}/gradio_api/call/v2/generate', body,
                                     {'Content-Type': 'application/json'})
    event = json.load(urllib.request.urlopen(request))['event_id']
    answer = urllib.request.urlopen(f'{page}/gradio_api/call/generate/{event}').read().decode()
    assert 'event: complete' in answer


def test_page_serves_nothing_else(page):
    for path in ('input.txt', 'served/model.pt', 'data/tiny/train.bin', '/etc/passwd',
                 os.path.join(HERE, 'app.py')):
        for route in ('gradio_api/file=', 'file=', 'static/', 'gradio_api/proxy='):
            try:
                answer = urllib.request.urlopen(f'{page}/{route}{path}')
            except OSError as error:  # urllib's HTTPError is one
                assert error.code >= 400
            else:
                assert b'<html' in answer.read(1000).lower()


def test_page_takes_no_way_around_its_limits(page):
    """No text past the queue, and no request larger than a prompt: Gradio would keep it for the session."""
    data = ['The', 20, 1.0, 50, 1.0, 1.0, 1, 1]
    for route, prompt, refusal in (('run', 'The', 404), ('call', 'x' * 30_000, 413)):
        body = json.dumps({'data': [prompt, *data[1:]]}).encode()
        request = urllib.request.Request(f'{page}/gradio_api/{route}/generate', body,
                                         {'Content-Type': 'application/json'})
        with pytest.raises(OSError) as refused:  # urllib's HTTPError is one
            urllib.request.urlopen(request)
        assert refused.value.code == refusal


def test_page_stops_a_long_prompt_between_two_layers(app):
    reads = threading.Event()

    def first_token():
        model = app['get_model']('')[0]
        end = time.time() + 20  # a long prompt
        while time.time() < end:
            reads.set()
            next(model.generate(torch.ones(1, 1, dtype=torch.long), 1))
        yield

    async def stop():
        visitor = asyncio.create_task(anext(app['on_thread'](first_token())))
        await asyncio.to_thread(reads.wait, 30)
        visitor.cancel()
        return await asyncio.wait_for(anext(app['on_thread'](text for text in ['the next one'])), 10)
    assert asyncio.run(stop()) == 'the next one'


def test_page_gives_many_clients_their_own_text_or_a_refusal(page):
    from gradio_client import Client
    clients = [Client(page, verbose=False) for _ in range(10)]
    prompts = [letter * 3 for letter in 'Thecatsonm']
    jobs = [client.submit(prompt, 200, api_name='/generate') for client, prompt in zip(clients, prompts)]
    served = 0
    for job, prompt in zip(jobs, prompts):
        try:
            text = job.result(timeout=60)[0]
            served += 1
            assert text.startswith(prompt) and len(text) == 203
        except Exception as error:
            assert 'queue' in str(error).lower(), error
    assert served >= 4


def test_page_waits_for_a_model(tmp_path):
    from gradio_client import Client
    process, address = serve(tmp_path / 'out', '--port=7897', cwd=tmp_path)
    assert address.endswith(':7897')
    with pytest.raises(Exception, match='config/quickstart.py'):
        Client(address, verbose=False).predict('Hello', api_name='/generate')
    status, _, error = ended(spawn('app.py', '--port=7897', cwd=tmp_path))  # the port is taken
    assert status == 1 and '7897' in error and 'Traceback' not in error, error
    process.terminate()
    assert process.wait(30) == 143


def test_page_prints_the_model_it_took(app, capsys):
    path = app['model_files']()[0]
    app['loaded'].__wrapped__(path, 0)
    assert capsys.readouterr().err == f'{path}\n'


def test_page_forgets_old_sessions(app):
    queue = app['page']._queue
    for i in range(3000):
        queue.pending_event_ids_session[f'session {i}'] = {'text'}
        queue.pending_messages_per_session[f'session {i}'] = asyncio.Queue()
    assert len(queue.pending_event_ids_session) == 2000 and 'session 2999' in queue.pending_event_ids_session
    # a KeyError here would end Gradio's queue, or hang a page
    assert queue.pending_event_ids_session['session 0'] == set()
    assert queue.pending_messages_per_session['session 0'].empty()
    assert queue.pending_event_ids_session['session 2999'] == {'text'}


def test_page_marks_what_is_recited(app):
    _, tokenizer, index = app['get_model']('')
    known = 'on the mat; é 日本 🎭.\nThe cat sat'  # 31 characters of the text, over a line's end
    ids = tokenizer.encode('mmm' + known + 'mm')
    found = app['recited'](ids, index, 30)
    assert found.tolist() == [False] * 3 + [True] * len(known) + [False] * 2
    assert app['highlighted'](ids[3:], tokenizer, found[3:]) == f'<mark>{known}</mark>mm'
    assert not app['recited'](ids[:20], index, 30).any()
    escaped = app['panels']({'prompt': '<b>'}, ['ok'])
    assert '<b>' not in escaped and '&lt;b&gt;' in escaped


def test_page_marks_nothing_without_the_training_text(app, monkeypatch):
    _, tokenizer, index = app['get_model']('')
    state = dict(prompt='The', ids=[1], streams=[TextStream(tokenizer)], seconds=1.0, seed=1, ended='written',
                 tokenizer=tokenizer)
    state['streams'][0].feed(tokenizer.encode('cat')[0])
    for known, count in ((index, 2), (None, 1)):
        state['index'] = known
        monkeypatch.setitem(app['updates'].__globals__, 'write', lambda *inputs: iter([state]))
        assert len(list(app['updates']())) == count


def test_page_lives_with_a_log_that_is_being_written(app, folder):
    log = folder / 'out/tiny/log.csv'
    before = log.read_bytes()
    try:
        for text in ('', 'step,loss\n', 'no table'):
            log.write_text(text)
            assert 'once log.csv holds steps' in app['look'](None, None)[4]
        rows = [f"{i},2,0.1,{'1,3' if i % 7 == 0 else ','}\n" for i in range(1, 3001)]
        log.write_text('step,loss,lr,train_loss,val_loss\n' + ''.join(rows))
        losses, rates, _ = app['curve']('out/tiny/log.csv', 0)
        assert (losses.curve == 'validation').sum() == 3000 // 7
        assert rates.step.iloc[-1] == 3000 and len(rates) < 1500
        path = app['model_files']()[0]
        *_, known = app['look'](path, None)
        log.write_text(log.read_text() + '3001,2,0.1,,\n')
        models, _, _, _, about, known = app['look'](path, known)
        assert 'step 3,001' in about and 'value' not in models  # a new value would undo a choice being made
        assert app['look'](path, known) == {'__type__': 'update'}
    finally:
        log.write_bytes(before)


def test_page_opens_a_file_again_only_when_it_changes(app, folder, monkeypatch):
    opened, real = [], torch.load
    monkeypatch.setattr(torch, 'load', lambda path, **more: (opened.append(path), real(path, **more))[1])
    first = app['look'](None, None)
    opened.clear()
    for _ in range(3):
        app['look'](None, None)
    assert not opened
    assert app['model_files']()[0] == find('out/tiny') == first[0]['value']
    os.utime('out/tiny/model.pt')
    app['look'](None, None)
    assert opened


def test_page_in_a_browser_writes_and_stops(page, folder):
    status = "document.querySelector('#status').innerText.includes('%s')"
    with browser_on(page) as (view, errors, requests):
        view.get_by_role('button', name='Once upon a time').click()
        view.wait_for_function("document.querySelector('#prompt textarea').value == 'Once upon a time'")
        view.fill('#prompt textarea', 'The mat')
        view.locator('#prompt textarea').press('Shift+Enter')
        view.wait_for_function(status % 'all tokens written')
        view.wait_for_function(status % 'word for word')
        assert view.locator('.text pre').count() == 1 and view.inner_text('.text .prompt') == 'The mat'
        assert len(view.locator('.text pre').text_content()) == 7 + 100
        view.locator('input[type=number][aria-label*="New tokens"]').fill('15000')
        view.locator('#prompt textarea').click()  # leaving the field takes its number
        view.click('#generate')
        view.wait_for_function(status % 'writing', polling=20)
        view.wait_for_function("document.querySelector('.text pre').textContent.length > 200", polling=20)
        view.click('#stop')
        view.wait_for_function(status % 'stopped')
        text = view.locator('.text pre').text_content()
        view.wait_for_timeout(500)
        assert view.locator('.text pre').text_content() == text and len(text) < 7 + 15000
        view.fill('#prompt textarea', 'x' * 200_000)  # is cut off; the request would be too large
        view.click('#generate')
        view.get_by_text('a text of at most 500 characters').wait_for()
        assert not errors, errors
        assert all(url.startswith((page, 'data:', 'blob:')) for url in requests), requests


def test_page_in_a_browser_shows_new_models_and_the_curve(page, folder):
    with browser_on(page) as (view, errors, _):
        shutil.copy(folder / 'served/model.pt', folder / 'served/model_copy.pt')
        view.wait_for_timeout(4000)  # the page looks every three seconds
        view.locator('#model input').click()
        view.get_by_role('option', name='model_copy').click()
        view.wait_for_function("document.querySelector('#model input').value.includes('model_copy')")
        for width in (1280, 400):
            view.set_viewport_size({'width': width, 'height': 800})
            assert view.evaluate('document.documentElement.scrollWidth') <= width  # no sideways scrolling
        view.get_by_role('tab', name='Training').click()
        view.wait_for_selector('canvas, svg.marks')
        assert not errors, errors
