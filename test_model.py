"""
The tests: against Hugging Face, tiktoken, torch and uninterrupted runs rather than against ourselves.

$ python -m pytest -q
"""
import csv
import hashlib
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import warnings

import numpy as np
import pytest
import tiktoken
import torch

import config
import model
import quantize
from model import (GPT, GPTConfig, HeadLoss, Int4Linear, Int8Linear, Muon, build, choose, filter_logits, find, load, orthogonalize, penalize, pick_device, read, save,
                   split_loss)
from prepare import CharTokenizer, GPT2Tokenizer, TextStream, check_dataset, cut_exactly, load_data, prepare

HERE = os.path.dirname(os.path.abspath(__file__))
SMALL = dict(block_size=64, vocab_size=1100, n_layer=2, n_head=2, n_embd=32)
TINY_RUN = ['--tokenizer=char', '--dataset=tiny', '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16',
            '--batch_size=4', '--max_iters=20', '--eval_interval=10', '--eval_iters=2', '--log_interval=5',
            '--checkpoint_interval=5', '--sample_interval=0', '--dtype=float32']


def run(script, *args, cwd, stdin=None):
    """Run a script as a user does; return the finished process with its text."""
    return subprocess.run([sys.executable, os.path.join(HERE, script), *args], cwd=cwd, capture_output=True, text=True,
                          encoding='utf-8', input=stdin, timeout=300)


def one_line(process, status, *words):
    """A refusal: this exit status, one line on stderr that holds these words, no traceback."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == status, process.stderr
    assert len(lines) == 1 and all(word in lines[0] for word in words), process.stderr


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL)).eval()


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """A folder with a small text in it and a tiny model trained on that, in out/tiny."""
    path = tmp_path_factory.mktemp('user')
    (path / 'input.txt').write_text('The cat sat on the mat; é 日本 🎭.\n' * 60, encoding='utf-8')
    process = run('train.py', *TINY_RUN, '--out_dir=out/tiny', cwd=path)
    assert process.returncode == 0, process.stderr
    (path / 'stdout.txt').write_text(process.stdout, encoding='utf-8')
    return path


# the network ----------------------------------------------------------------------------------------------------------

def hugging_face(model):
    """Hugging Face's GPT-2 with our weights."""
    transformers = pytest.importorskip('transformers', reason='pip install transformers')
    c = model.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head)).eval()
    weights = {f'transformer.{name}': p.t() if re.search(r'(c_\w+)\.weight', name) else p  # theirs are Conv1D: transposed
               for name, p in model.state_dict().items()}
    weights['transformer.wte.weight'] = weights['lm_head.weight'] = weights['transformer.wte.weight'][:c.vocab_size]
    theirs.load_state_dict(weights)
    return theirs


@pytest.mark.parametrize('shape', [SMALL, dict(vocab_size=50257, n_layer=2)], ids=['small', 'gpt2-wide'])
def test_equals_hugging_face(shape):
    torch.manual_seed(1)
    model = GPT(GPTConfig(**shape)).eval()
    for p in model.parameters():  # biases and norms too must matter
        p.data += 0.05 * torch.randn_like(p)
    theirs = hugging_face(model)
    idx = torch.randint(model.config.vocab_size, (2, 33))
    with torch.no_grad():
        ours = model(idx)
        assert ours.shape == (2, 33, model.config.vocab_size)
        assert (ours - theirs(idx).logits).abs().max() < 1e-4
        assert abs(model(idx, idx).item() - torch.nn.functional.cross_entropy(ours.flatten(0, 1), idx.flatten()).item()) < 1e-5
    text = theirs.generate(idx, max_new_tokens=25, do_sample=False, pad_token_id=0, eos_token_id=None)[:, 33:]
    assert torch.equal(torch.stack(list(model.generate(idx, 25, temperature=0)), dim=1), text)


def test_causality(gpt):
    idx = torch.randint(1100, (1, 20))
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 1100
    with torch.no_grad():
        difference = (gpt(idx) - gpt(changed)).abs().amax(dim=(0, 2))
    assert difference[:10].max() == 0 and difference[10:].min() > 0


@pytest.mark.parametrize('shape', [dict(n_layer=2), dict(SMALL, vocab_size=65), dict(SMALL, bias=False)], ids=['50257', '65', 'no bias'])
def test_first_loss_is_ln_v(shape):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape))
    V, C = model.config.vocab_size, model.config.n_embd
    idx = torch.randint(V, (4, 65))
    assert abs(model(idx[:, :-1], idx[:, 1:]).item() - math.log(V) - 0.0002 * C) < 0.1


def test_gpt2_small_has_its_parameters():
    with torch.device('meta'):
        model = GPT(GPTConfig())
    assert model.num_params() == 124_439_808
    assert model.wte.weight.shape == (50304, 768)
    assert model.flops_per_token(1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


def test_residual_projections_start_smaller():
    torch.manual_seed(0)
    weights = GPT(GPTConfig(n_layer=3, n_embd=192, n_head=3, vocab_size=100)).state_dict()
    assert abs(weights['h.1.mlp.c_fc.weight'].std() / 0.02 - 1) < 0.05
    assert abs(weights['h.1.mlp.c_proj.weight'].std() / (0.02 / math.sqrt(6)) - 1) < 0.05
    assert not weights['h.1.attn.c_attn.bias'].any()


def test_decay_groups_are_disjoint_and_complete(gpt):
    groups = gpt.param_groups(0.1)
    ids = [id(p) for group in groups for p in group['params']]
    assert len(ids) == len(set(ids)) == len(list(gpt.parameters()))
    for group in groups:
        assert all(p.dim() == (2 if group['weight_decay'] else 1) for p in group['params'])
    assert [group['weight_decay'] for group in groups] == [0.1, 0.1, 0.0]
    gpt.extra = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match='group'):
        gpt.param_groups(0.1)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_the_chunked_loss_equals_cross_entropy(dtype, tolerance):
    """Loss and gradients, over more rows than one chunk holds."""
    torch.manual_seed(0)
    N, V, C = 1500, 50304, 16
    x, table, targets = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True), torch.randint(V, (N,))
    results = []
    for loss_of in (lambda: HeadLoss.apply(x, table, targets), lambda: torch.nn.functional.cross_entropy(x @ table.t(), targets)):
        x.grad = table.grad = None
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = 3 * loss_of()
        loss.backward()
        results.append((loss.detach(), x.grad, table.grad))
    for ours, theirs in zip(*results):
        assert (ours - theirs).norm() / theirs.norm() < tolerance


def test_muon_orthogonalizes_and_learns(gpt):
    """Its singular values near 1 for every shape, q, k and v apart; torch's own Muon is the reference for a step."""
    for shape in ((3, 24, 24), (2, 96, 24), (1, 24, 96)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.3
    ours, theirs = (torch.nn.Parameter(torch.randn(96, 32)) for _ in range(2))
    theirs.data.copy_(ours.data)
    if hasattr(torch.optim, 'Muon'):
        pair = (Muon([{'params': [ours], 'weight_decay': 0.1}], lr=1e-2, dtype=torch.float32),
                [torch.optim.Muon([p], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn='match_rms_adamw')
                 for p in (torch.nn.Parameter(part.clone()) for part in theirs.data.chunk(3))])
        for _ in range(3):
            grad = torch.randn(96, 32)
            ours.grad = grad.clone()
            pair[0].step()
            for one, part in zip(pair[1], grad.chunk(3)):
                one.param_groups[0]['params'][0].grad = part.clone()
                one.step()
        parts = torch.cat([one.param_groups[0]['params'][0] for one in pair[1]])
        assert (ours - parts).abs().max() < 0.1 * 1e-2  # theirs runs the products in bfloat16


def test_gpt_compiles_into_one_graph(gpt):
    """By a user of model.py, under no_grad and in training: fullgraph raises where the graph breaks."""
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


@pytest.mark.parametrize('shape', [(5, 64), (2, 3, 64), (1, 64)], ids=str)
@pytest.mark.parametrize('bias', [True, False])
def test_product_and_its_gradients_equal_torchs(shape, bias):
    torch.manual_seed(0)
    x, weight, b = torch.randn(shape), torch.randn(96, 64), torch.randn(96)
    grad, results = torch.randn(*shape[:-1], 96), []
    for f in (model.product, torch.nn.functional.linear):
        inputs = [t.clone().requires_grad_() for t in (x, weight, b)[:3 if bias else 2]]
        y = f(*inputs)
        y.backward(grad)
        results.append([y, *(t.grad for t in inputs)])
    with torch.no_grad():  # where it takes another way
        assert torch.allclose(model.product(x, weight, b if bias else None), results[1][0], atol=1e-4)
    assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(*results))


def test_overfits_one_batch(gpt):
    idx = torch.randint(1100, (4, 17))
    optimizer = torch.optim.AdamW(gpt.param_groups(0.0), lr=3e-3)
    gpt.train()
    for _ in range(150):
        loss = gpt(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize('wrong', [dict(n_head=5), dict(n_layer=0), dict(dropout=1.0), dict(vocab_size=-3)], ids=str)
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong)))):
        GPTConfig(**{**SMALL, **wrong})


# generation -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('length, B, compile', [(1, 1, 'False'), (7, 3, 'False'), (15, 1, 'False'), (16, 3, 'False'), (40, 1, 'False'),
                                                (7, 1, 'True'), (5, 3, 'True')])
def test_cached_steps_equal_whole_forward_passes(gpt, monkeypatch, length, B, compile):
    """Within the window and across slides, which keep the newest half of it."""
    gpt.trained_context = 16
    idx = torch.randint(1100, (B, length))
    window, seen = idx[:, -16:], []
    monkeypatch.setattr(model, 'choose', lambda logits, *rest: seen.append(logits.clone()) or choose(logits, *rest))
    for ids in gpt.generate(idx, 40, temperature=0, compile=compile):
        if window.size(1) > 16:
            window = window[:, -8:]
        with torch.no_grad():
            logits = gpt(window)[:, -1]
        assert torch.equal(ids, logits.argmax(dim=-1)) and (logits - seen.pop()).abs().max() < 1e-4
        window = torch.cat((window, ids[:, None]), dim=1)


@pytest.mark.parametrize('B', [1, 4])
def test_greedy_text_equals_hugging_face(B):
    torch.manual_seed(1)
    gpt = GPT(GPTConfig(block_size=256, vocab_size=1100, n_layer=2, n_head=2, n_embd=32)).eval()
    for p in gpt.parameters():
        p.data *= 4  # logits far enough apart that the last bits do not decide
    theirs, idx = hugging_face(gpt), torch.randint(1100, (B, 9))
    with torch.no_grad():
        expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=200, do_sample=False, eos_token_id=None,
                                   pad_token_id=0, repetition_penalty=1.3)
    ids = torch.stack(list(gpt.generate(idx, 200, temperature=0, repetition_penalty=1.3)), dim=1)
    assert torch.equal(ids, expected[:, 9:])


@pytest.mark.parametrize('settings', [dict(temperature=0.7), dict(top_k=50), dict(top_k=1), dict(top_p=0.9), dict(top_p=0.0), dict(min_p=0.05),
                                      dict(min_p=1.0), dict(repetition_penalty=1.3), dict(temperature=2.0, top_k=300, top_p=0.8, min_p=0.01,
                                                                                          repetition_penalty=0.8)], ids=str)
def test_filtered_distributions_equal_hugging_face(settings):
    process = pytest.importorskip('transformers.generation.logits_process', reason='pip install transformers')
    torch.manual_seed(0)
    logits, idx = 3 * torch.randn(16, 1100), torch.randint(1100, (16, 40))
    penalty, temperature = settings.pop('repetition_penalty', 1.0), settings.get('temperature', 1.0)
    seen = torch.zeros(16, 1100, dtype=torch.bool).scatter_(1, idx, True)
    ours = filter_logits(penalize(logits, seen, penalty), **settings).softmax(dim=-1)
    theirs = process.RepetitionPenaltyLogitsProcessor(penalty)(idx, logits)
    theirs = process.TemperatureLogitsWarper(temperature)(idx, theirs)
    for key, warper in (('top_k', process.TopKLogitsWarper), ('top_p', process.TopPLogitsWarper), ('min_p', process.MinPLogitsWarper)):
        if key in settings:
            theirs = warper(settings[key])(idx, theirs)
    assert (ours - theirs.softmax(dim=-1)).abs().max() < 1e-5


def test_a_text_depends_on_its_seed_alone(gpt):
    idx = torch.randint(1100, (1, 5))
    batch = torch.stack(list(gpt.generate(idx, 20, num_samples=3, seed=7)), dim=1)
    torch.rand(3)  # whatever else draws
    alone = torch.stack(list(gpt.generate(idx, 20, seed=8)), dim=1)
    assert torch.equal(batch[1], alone[0])
    assert not torch.equal(batch[0], batch[1])
    two = torch.cat((idx, idx.flip(1)))  # each prompt's texts are side by side
    assert torch.equal(torch.stack(list(gpt.generate(two, 20, num_samples=3, seed=7)), dim=1)[:3], batch)


def test_choices():
    logits, uniform = torch.tensor([[0.0, 3.0, 2.0, -1.0]]).expand(4000, 4), torch.rand(4000)
    assert (choose(logits, uniform, temperature=0) == 1).all()
    assert set(choose(logits, uniform, 5.0, top_k=2).tolist()) == {1, 2}
    assert (choose(logits, uniform, 1e-300) == 1).all() and (choose(logits, uniform, top_p=0.0) == 1).all()  # no overflow to nan
    counts = torch.bincount(choose(logits, uniform, 2.0), minlength=4)
    assert (counts / 4000 - torch.softmax(logits[0] / 2, 0)).abs().max() < 0.03
    edge = torch.tensor([1 - 2**-24, 0.0])  # the greatest and least numbers that torch.rand gives
    assert choose(torch.tensor([[0.0, -math.inf, 0.0, -math.inf]] * 2), edge).tolist() == [2, 0]


def test_any_setting_gives_a_text(gpt):
    rng = random.Random(0)
    for _ in range(1000):
        settings = dict(temperature=rng.choice([0.0, 1e-300, 0.8, 1e9]), top_k=rng.choice([0, 1, 50, 10**9]), top_p=rng.choice([0.0, 1e-9, 0.9, 1.0]),
                        min_p=rng.choice([0.0, 1e-300, 0.1, 1.0]), repetition_penalty=rng.choice([1e-3, 1.0, 1.2, 1e3]), num_samples=rng.choice([1, 3]),
                        seed=rng.choice([0, 2**63 - 1]), context=rng.choice([0, 1, 2, 33]))
        steps = list(gpt.generate(torch.randint(1100, (1, rng.choice([1, 63, 64, 65, 500]))), rng.choice([1, 2, 2, 2, 70]), **settings))
        assert all(0 <= ids.min() and ids.max() < 1100 for ids in steps), settings


def test_padded_ids_are_never_sampled(gpt):
    with torch.no_grad():
        gpt.wte.weight[1100:] = 100 * gpt.wte.weight[:1].sign()  # rows 1100 to 1151 are padding
    assert gpt.config.padded_vocab_size == 1152
    assert all(ids.max() < 1100 for ids in gpt.generate(torch.zeros(8, 1, dtype=torch.long), 60, temperature=9.0))


def test_generation_stops_at_a_stop_id_and_restores_the_mode(gpt):
    gpt.train()
    idx = torch.tensor([[1, 2, 3]])
    steps = [ids.item() for ids in gpt.generate(idx, 30, seed=3)]
    stop = steps[10]
    assert [ids.item() for ids in gpt.generate(idx, 30, seed=3, stop_ids=(stop,))] == steps[:steps.index(stop) + 1]
    assert gpt.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_split_loss_of_less_than_a_window(gpt):
    ids = torch.randint(1100, (6,))
    with torch.no_grad():
        assert abs(split_loss(gpt, ids.numpy().astype('<u2'), 32) - gpt(ids[None, :-1], ids[None, 1:]).item()) < 1e-5


def test_split_loss_is_the_mean_over_every_token(gpt):
    tokens = np.random.default_rng(0).integers(0, 1100, 103).astype(np.uint16)
    ids, total = torch.from_numpy(tokens.astype(np.int64)), 0.0
    for i in range(0, 102, 16):
        x, y = ids[i:i + 16][:102 - i], ids[i + 1:i + 17]
        with torch.no_grad():
            total += torch.nn.functional.cross_entropy(gpt(x[None])[0], y, reduction='sum').item()
    assert abs(split_loss(gpt, tokens, 16, batch_tokens=32) - total / 102) < 1e-5
    with pytest.raises(ValueError, match='at least 2'):
        split_loss(gpt, tokens[:1], 16)


@pytest.mark.parametrize('name, rank, device', [('auto', None, 0), ('cuda', None, 0), ('cuda', '1', 1), ('cuda:1', None, 1), ('auto', '1', 1)])
def test_pick_device_names_a_gpu_that_torch_takes(name, rank, device, monkeypatch):
    """By torch's own reading of the name, and without a call that opens a context."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    if rank:
        monkeypatch.setenv('LOCAL_RANK', rank)
    assert torch.cuda._utils._get_device_index(pick_device(name)) == device
    for wrong in ('cuda:2', 'cuda:x', 'tpu', 'meta'):
        with pytest.raises(ValueError, match=wrong):
            pick_device(wrong)


@pytest.mark.parametrize('args, environment, index', [([], {}, 0), (['--device=cuda'], {'LOCAL_RANK': '1'}, 1), (['--device=cuda:1'], {}, 1)])
def test_train_sets_the_gpu_first(folder, args, environment, index):
    """The name that set_device is given, in torch's own reading of it."""
    code = f"""
import runpy, sys, torch
def set_device(name):
    sys.exit(f'set to GPU {{torch.cuda._utils._get_device_index(name)}}')
torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: 2, set_device
sys.argv[0] = 'train.py'
runpy.run_path({os.path.join(HERE, 'train.py')!r}, run_name='__main__')"""
    process = subprocess.run([sys.executable, '-c', code, *TINY_RUN, '--out_dir=out/gpu', *args], cwd=folder, capture_output=True,
                             text=True, env={**os.environ, 'PYTHONPATH': HERE, **environment}, timeout=100)
    assert process.stderr == f'set to GPU {index}\n', process.stderr


# files ----------------------------------------------------------------------------------------------------------------

def test_a_model_file_says_it_all_and_loads_alike(gpt, tmp_path):
    gpt.trained_context = 32
    save(tmp_path / 'model.pt', gpt, {'name': 'gpt2', 'vocab_size': 50257}, step=5, losses={'train': 1.0}, made_by='a test')
    contents = torch.load(tmp_path / 'model.pt', weights_only=True)
    assert contents['model']['wte.weight'].shape == (1100, 32)
    model, meta = load(tmp_path)
    assert (meta['step'], meta['trained_context'], meta['tokenizer']['name'], model.trained_context) == (5, 32, 'gpt2', 32)
    idx = torch.randint(1100, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(idx), gpt(idx))
        assert abs(model.train()(idx, idx) - model.eval()(idx, idx)) < 0.05  # padding must not weigh in the softmax
    assert os.listdir(tmp_path) == ['model.pt']


def test_find_takes_most_steps_then_the_newest_run(gpt, tmp_path):
    def write(name, step):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, gpt, {}, step=step)
        time.sleep(0.02)
        return str(tmp_path / name)
    with pytest.raises(FileNotFoundError, match='quickstart'):
        find(tmp_path)
    write('a/model.pt', 9)
    newest = write('b/ckpt.pt', 3)
    write('b/best.pt', 8)
    write('model_int8.pt', 9)
    assert find(tmp_path) == newest
    model = write('model.pt', 5)
    assert find(tmp_path) == model
    assert find(tmp_path) != write('ckpt.pt', 4)
    assert write('ckpt.pt', 6) == find(tmp_path)
    assert find(model) == model


def test_a_hub_id_is_its_model_files(gpt, tmp_path, monkeypatch):
    hub = pytest.importorskip('huggingface_hub', reason='pip install gradio')
    save(tmp_path / 'model.pt', gpt, {}, step=7)
    monkeypatch.setattr(hub, 'snapshot_download', lambda repo, **_: {'someone/folio': str(tmp_path)}[repo])
    assert load('someone/folio')[1]['step'] == 7
    with pytest.raises(FileNotFoundError, match='someone/else: no such file or folder here, and not to be had from the Hub'):
        find('someone/else')
    with pytest.raises(FileNotFoundError, match='no such model file'):
        find(str(tmp_path / 'none'))  # no id


def test_damaged_files_are_refused(gpt, tmp_path):
    path = tmp_path / 'model.pt'
    save(path, gpt, {}, step=1)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for contents in (bytes(flipped), whole[:-100], whole[:1000], b'', b'not a model'):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match='damaged'):
            load(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match='format version'):
        load(path)
    torch.save({**read_whole(whole, tmp_path), 'config': dict(SMALL, n_embd=64)}, path)
    with pytest.raises(ValueError, match='do not fit'):
        load(path)


@pytest.mark.parametrize('missing', ['model', 'step', 'trained_context', 'tokenizer'])
def test_a_file_that_lacks_a_part_is_refused(gpt, tmp_path, missing):
    save(tmp_path / 'model.pt', gpt, {}, step=1)
    contents = torch.load(tmp_path / 'model.pt', weights_only=True)
    del contents[missing]
    torch.save(contents, tmp_path / 'model.pt')
    with pytest.raises(ValueError, match=f'lacks {missing}'):
        load(tmp_path / 'model.pt')


def test_a_write_that_fails_leaves_what_was_there(gpt, tmp_path, monkeypatch):
    save(tmp_path / 'model.pt', gpt, {}, step=1)
    monkeypatch.setattr(os, 'fsync', lambda fd: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(OSError, match='model.pt could not be written .No space left'):
        save(tmp_path / 'model.pt', gpt, {}, step=2)
    assert os.listdir(tmp_path) == ['model.pt'] and read(tmp_path / 'model.pt')['step'] == 1


def read_whole(contents, tmp_path):
    (tmp_path / 'copy.pt').write_bytes(contents)
    return read(tmp_path / 'copy.pt')


# quantization ---------------------------------------------------------------------------------------------------------

def layer_of(kind, w, bias):
    O, C = w.shape
    layer = {'int8': Int8Linear, 'int4': Int4Linear}[kind](C, O, bias is not None)
    layer.weight, scale = getattr(quantize, f'to_{kind}')(w)
    layer.scale, layer.bias = scale.float(), bias
    return layer


@pytest.mark.parametrize('kind, tolerance', [('int8', 0.01), ('int4', 0.10)])
@pytest.mark.parametrize('O, C', [(96, 64), (65, 33), (7, 100), (1, 1), (2304, 768)])
@pytest.mark.parametrize('rows', [1, 3, 40])
def test_a_quantized_layer_is_near_the_float_one(kind, tolerance, O, C, rows):
    torch.manual_seed(0)
    w, bias, x = torch.randn(O, C), torch.randn(O), torch.randn(2, rows, C)
    layer = layer_of(kind, w, bias)
    table = layer.rows(torch.arange(O))
    assert (table - w).square().mean().sqrt() < tolerance * w.square().mean().sqrt() + (1e-3 if kind == 'int4' else 0)
    exact = x @ table.t() + bias
    wrong = lambda y: ((y - exact).square().mean() / exact.square().mean()).sqrt()  # noqa: E731
    assert wrong(layer(x)) < 0.02  # activations in int8, or bfloat16
    if kind == 'int4':
        layer.pack()
        assert wrong(layer(x)) < 0.02 and layer(x[:, :1]).shape == (2, 1, O)
    assert layer(torch.zeros(1, 1, C)).isfinite().all() and layer_of(kind, 0 * w, None)(x).abs().max() == 0


def test_int8_without_vnni_and_in_16_bits(monkeypatch):
    w, x = torch.randn(65, 33), torch.randn(4, 33)
    layer = layer_of('int8', w, None)
    exact = x @ layer.rows(torch.arange(65)).t()
    assert ((layer.bfloat16()(x.bfloat16()) - exact).square().mean() / exact.square().mean()).sqrt() < 0.03
    monkeypatch.setattr(model, 'HAS_VNNI', False)  # weights alone are int8
    assert torch.allclose(layer_of('int8', w, None)(x), exact, atol=1e-5)


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_weights_that_do_not_fit_are_refused(kind):
    for name, value, words in (('h.0.mlp.c_fc.weight', math.nan, 'not finite'), ('h.0.mlp.c_fc.weight', math.inf, 'not finite'),
                               ('ln_f.weight', 1e5, 'too large')):
        weights = {name: torch.full((3, 32) if 'mlp' in name else (32,), value)}
        with pytest.raises(ValueError, match=words):
            quantize.convert(weights, kind)


def test_int8_is_as_near_as_torchs_own():
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(256, 300), torch.randn(50, 256)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='torch.ao.quantization is deprecated', category=DeprecationWarning)
        warnings.filterwarnings('ignore', message='torch.quantize_per_tensor')
        reference = getattr(torch.ao.quantization, 'quantize_dynamic', None)
        if reference is None:
            pytest.skip('this torch has no torch.ao.quantization any more')
        theirs = reference(torch.nn.Sequential(plain), {torch.nn.Linear}, dtype=torch.qint8)(x)
    with torch.no_grad():
        ours, exact = layer_of('int8', plain.weight, plain.bias)(x), plain(x)
    assert (ours - exact).square().mean() <= (theirs - exact).square().mean()


@pytest.mark.parametrize('kind, tolerance', [('int8', 0.02), ('int4', 0.2)])
@pytest.mark.parametrize('shape', [dict(SMALL, n_embd=128), dict(SMALL, bias=False), dict(SMALL, vocab_size=65, n_embd=36)], ids=str)
def test_a_quantized_model_is_near_the_float_one(kind, tolerance, shape):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**shape)).eval()
    idx = torch.randint(65, (3, 40))
    with torch.no_grad():
        exact = gpt(idx)
    weights = dict(gpt.state_dict())
    weights['wte.weight'] = weights['wte.weight'][:shape['vocab_size']]
    quantize.convert(weights, kind)
    assert all(w.dtype.itemsize <= 2 for w in weights.values())
    model = build({'config': dict(shape, quantized=kind), 'trained_context': 64, 'model': weights})
    with torch.no_grad():
        assert ((model(idx) - exact).square().mean() / exact.square().mean()).sqrt() < tolerance
    assert model.num_params() == gpt.num_params()
    assert len(list(model.generate(idx, 70, num_samples=2))) == 70


def test_quantize_as_a_user_runs_it(folder):
    shutil.copytree(folder / 'out/tiny', folder / 'out/small')
    for kind in ('int8', 'int4', 'bfloat16', 'float32'):
        process = run('quantize.py', '--checkpoint=out/small', f'--dtype={kind}', '--sidecars', cwd=folder)
        assert process.returncode == 0, process.stderr
        for words in ('size, MB', 'loss', 'tokens/s, one text', 'tokens/s, eight', 'load, s', 'data/tiny, validation', f'model_{kind}.pt'):
            assert words in process.stdout, process.stdout
        model, meta = load(folder / f'out/small/model_{kind}.pt')
        assert meta['step'] == 20 and 'quantize.py' in meta['made_by'] and meta['trained_context'] == 16
        assert run('sample.py', f'--checkpoint=out/small/model_{kind}.pt', '--start=cat', '--max_new_tokens=5', cwd=folder).returncode == 0
    assert json.loads((folder / 'out/small/config.json').read_text())['n_embd'] == 16
    assert json.loads((folder / 'out/small/meta.json').read_text(encoding='utf-8'))['tokenizer']['name'] == 'char'
    refused = lambda *args: run('quantize.py', *args, cwd=folder)  # noqa: E731
    process = refused('--checkpoint=out/small/model_int8.pt')
    assert process.returncode == 1 and 'int8 already' in process.stderr and 'Traceback' not in process.stderr
    process = refused('--checkpoint=out/small', '--dataset=typo')
    assert process.returncode == 2 and 'typo' in process.stderr and 'Traceback' not in process.stderr
    assert refused('--checkpoint=out/small/best.pt').returncode == 0 and (folder / 'out/small/best_int8.pt').exists()
    with pytest.raises(ValueError, match='not saved again'):
        save(folder / 'again.pt', load(folder / 'out/small/model_int4.pt')[0], {}, step=1)
    one_line(run('quantize.py', '--checkpoint=out/small', '--dtype=int7', cwd=folder), 2, 'int8, int4')
    one_line(run('quantize.py', '--checkpoint=none', cwd=folder), 1, 'none')
    one_line(run('train.py', *TINY_RUN, '--init_from=out/small/model_int8.pt', '--out_dir=out/no', cwd=folder), 1, 'cannot be trained')


def test_a_result_that_lost_too_much_is_not_written(folder):
    args = [*TINY_RUN, '--out_dir=out/lossy', '--max_iters=300', '--learning_rate=1e-2', '--eval_interval=0']
    assert run('train.py', *args, cwd=folder).returncode == 0
    contents = read(folder / 'out/lossy/model.pt')
    for norm, matrix in (('ln_1', 'attn.c_attn'), ('ln_2', 'mlp.c_fc')):  # the same function, but one weight takes its group's bits
        for name in ('weight', 'bias'):
            contents['model'][f'h.0.{norm}.{name}'][0] /= 1000
        contents['model'][f'h.0.{matrix}.weight'][:, 0] *= 1000
    torch.save(contents, folder / 'out/lossy/model.pt')
    process = run('quantize.py', '--checkpoint=out/lossy/model.pt', '--dtype=int4', '--max_loss_increase=0', cwd=folder)
    assert process.returncode == 1 and all(words in process.stderr for words in ('int4 raises the loss', '--max_loss_increase=0', '--dtype=int8'))
    assert not (folder / 'out/lossy/model_int4.pt').exists()


def test_measure_samples_the_int8_file(folder):
    args = ['--tokenizer=char', '--dataset=shakespeare_char', '--n_layer=1', '--n_head=2', '--n_embd=16', '--max_iters=2', '--batch_size=2', '--final_eval_tokens=200']
    process = subprocess.run(['bash', os.path.join(HERE, '.ci/measure'), 'C', '--', *args], capture_output=True, text=True, timeout=300,
                             env={**os.environ, 'PYTHON': sys.executable, 'OUT': str(folder / 'measured')})
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(r'C/model_int8\.pt: [\d,]+ parameters', process.stderr) and process.stdout.count('To be') == 3, process.stderr


# other projects' files ------------------------------------------------------------------------------------------------

WIDE = dict(block_size=96, n_layer=2, n_head=4, n_embd=64)  # with GPT-2's vocabulary


def theirs(tmp_path, **changes):
    """A random GPT-2 of Hugging Face's, saved in tmp_path / 'hf'."""
    transformers = pytest.importorskip('transformers', reason='pip install transformers')
    torch.manual_seed(3)
    made = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **{**dict(n_positions=96, n_embd=64, n_layer=2, n_head=4, initializer_range=0.1), **changes})).eval()
    for name, p in made.named_parameters():
        if name.endswith('bias'):
            torch.nn.init.normal_(p, std=0.1)
    made.save_pretrained(tmp_path / 'hf')
    return made


def same_network(ours, theirs, idx):
    with torch.no_grad():
        assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-4
    text = theirs.generate(idx, max_new_tokens=25, do_sample=False, pad_token_id=0, eos_token_id=None)[:, idx.size(1):]
    assert torch.equal(torch.stack(list(ours.generate(idx, 25, temperature=0)), dim=1), text)


@pytest.mark.parametrize('form', ['safetensors', 'sharded', 'bin', 'old bin', 'half', 'extended'])
def test_hugging_face_folders_load(tmp_path, form):
    made = theirs(tmp_path, vocab_size=50260 if form == 'extended' else 50257)
    out = tmp_path / 'hf'
    if form == 'sharded':
        made.save_pretrained(out, max_shard_size='5MB')
        (out / 'model.safetensors').unlink()
        assert len(list(out.glob('*.safetensors'))) == 2
    elif 'bin' in form:
        (out / 'model.safetensors').unlink()
        weights = {name: w for name, w in made.transformer.state_dict().items()}  # without a prefix, as OpenAI's on the Hub
        weights['h.0.attn.bias'] = torch.ones(1, 1, 96, 96).tril()  # versions of old kept their masks
        torch.save(weights, out / 'pytorch_model.bin', _use_new_zipfile_serialization=form == 'bin')
    elif form == 'half':
        made.half().save_pretrained(out)
        made.float()
    ours, meta = load(out)
    assert (meta['tokenizer'], meta['trained_context'], meta['step']) == ({'name': 'gpt2', 'vocab_size': 50257}, 96, 0)
    assert ours.num_params() == sum(p.numel() for p in made.parameters()) - 64 * (made.config.vocab_size - 50257)
    if form != 'extended':  # where the added ids would be in theirs' texts
        same_network(ours, made, torch.randint(50257, (2, 20)))
    ours.train()
    ours(torch.randint(50257, (2, 20)), torch.randint(50257, (2, 20))).backward()  # the weights are ours to train


@pytest.mark.parametrize('shape, dtype', [(WIDE, 'float32'), (WIDE, 'bfloat16'), (dict(WIDE, bias=False), 'float32'), (dict(SMALL, vocab_size=65), 'float32')],
                         ids=['gpt2', 'bfloat16', 'no bias', 'char'])
def test_hugging_face_and_back(tmp_path, shape, dtype):
    transformers = pytest.importorskip('transformers', reason='pip install transformers')
    torch.manual_seed(4)
    model = GPT(GPTConfig(**shape)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    tokenizer = GPT2Tokenizer() if model.config.vocab_size == 50257 else CharTokenizer(map(chr, range(10, 75)))
    model.trained_context = 48
    save(tmp_path / 'model.pt', model, tokenizer.meta, step=7, losses={'train': 2.0}, dataset='none', made_by='a test')
    process = run('quantize.py', '--checkpoint=model.pt', '--format=hf', f'--dtype={dtype}', cwd=tmp_path)
    assert process.returncode == 0 and 'hf' in process.stdout, process.stderr
    out, V = tmp_path / 'hf', model.config.vocab_size
    again, meta = load(out)
    for name, w in again.state_dict().items():
        assert torch.equal(w[:V], model.state_dict()[name][:V].to(getattr(torch, dtype)).float()), name
    assert (again.config, meta['step'], meta['losses'], meta['trained_context']) == (model.config, 7, {'train': 2.0}, 48)
    assert meta['tokenizer'] == tokenizer.meta and 'a test' in meta['made_by']
    assert '| 7 |' in (out / 'README.md').read_text() and 'train 2.0000' in (out / 'README.md').read_text()
    made = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert made.config.tie_word_embeddings and made.lm_head.weight is made.transformer.wte.weight
    assert made.lm_head.weight.shape == (V, model.config.n_embd)
    same_network(again, made, torch.randint(V, (2, 20)))
    words = transformers.AutoTokenizer.from_pretrained(out)
    for seed in range(20):
        text = random_text(random.Random(seed), 200)
        if V == 65:
            text = ''.join(c for c in text * 3 if c in tokenizer.characters)
        assert words(text).input_ids == tokenizer.encode(text, special_tokens=V != 65) and words.decode(words(text).input_ids) == text
    process = run('sample.py', '--checkpoint=hf', '--start=<', '--max_new_tokens=4', cwd=tmp_path)
    assert process.returncode == 0 and process.stdout.startswith('<'), process.stderr


def test_what_hugging_face_has_no_form_for(folder):
    one_line(run('quantize.py', '--format=hf', '--dtype=int8', cwd=folder), 2, 'int8', 'float32 or bfloat16')
    one_line(run('quantize.py', '--format=gguf', cwd=folder), 2, 'folio, hf')
    process = run('quantize.py', '--format=hf', '--sidecars', '--checkpoint=out/tiny', cwd=folder)
    assert process.returncode == 2 and "--sidecars: its config.json would stand where Hugging Face's does" in process.stderr
    assert not (folder / 'out/tiny/config.json').exists()


def test_an_export_leaves_nothing_of_the_one_before(folder):
    shutil.copytree(folder / 'out/tiny', folder / 'out/twice')
    (folder / 'out/twice/hf').mkdir()
    for name in ('model-00001-of-00002.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'merges.txt', 'mine.txt'):
        (folder / 'out/twice/hf' / name).write_text('{}')
    process = run('quantize.py', '--format=hf', '--checkpoint=out/twice', cwd=folder)
    assert process.returncode == 0 and 'transformers leaves out those' in process.stdout, process.stderr
    assert sorted(os.listdir(folder / 'out/twice/hf')) == ['README.md', 'config.json', 'generation_config.json', 'mine.txt', 'model.safetensors',
                                                           'tokenizer.json', 'tokenizer_config.json']


def nanogpt(vocab_size=65, **shape):
    """A checkpoint in nanoGPT's form, of a model compiled, and that model."""
    torch.manual_seed(5)
    made = GPT(GPTConfig(**{**SMALL, 'vocab_size': vocab_size, **shape})).eval()
    weights = {f'_orig_mod.transformer.{name}': w for name, w in made.state_dict().items()}
    weights['_orig_mod.lm_head.weight'] = weights['_orig_mod.transformer.wte.weight']
    arguments = dict(n_layer=2, n_head=2, n_embd=32, block_size=64, bias=made.config.bias, vocab_size=len(made.wte.weight), dropout=0.1)
    return dict(model=weights, optimizer={'state': {}}, model_args=arguments, iter_num=30, best_val_loss=torch.tensor(2.5),
                config={'dataset': 'nano_char'}), made


@pytest.mark.parametrize('bias', [True, False])
def test_nanogpt_checkpoints_sample_and_train_here(folder, bias):
    home = folder / f'nanogpt{bias}'
    (home / 'out').mkdir(parents=True)
    (home / 'data/nano_char').mkdir(parents=True)
    characters = ''.join(map(chr, range(10, 75)))
    text = np.frombuffer((characters * 4).encode(), dtype=np.uint8) - 10
    for split in ('train', 'val'):
        text.astype('<u2').tofile(home / f'data/nano_char/{split}.bin')
    contents, made = nanogpt(bias=bias)
    torch.save(contents, home / 'out/ckpt.pt')
    process = run('sample.py', f'--checkpoint={home}/out', '--start=A', cwd=folder)
    assert process.returncode == 1 and 'nothing says which characters' in process.stderr and 'Traceback' not in process.stderr
    meta = dict(vocab_size=65, itos=dict(enumerate(characters)), stoi={c: i for i, c in enumerate(characters)})
    (home / 'data/nano_char/meta.pkl').write_bytes(pickle.dumps(meta))
    process = run('sample.py', f'--checkpoint={home}/out', '--start=A', '--max_new_tokens=5', cwd=folder)
    assert process.returncode == 0 and 'parameters, step 30' in process.stderr, process.stderr
    model, meta = load(home / 'out')
    idx = torch.randint(65, (2, 30))
    with torch.no_grad():
        assert torch.equal(model(idx), made(idx)) and model.config.bias == bias
    before = split_loss(made, text.astype(np.uint16), 64)
    process = run('train.py', '--init_from=out', '--dataset=nano_char', '--out_dir=here', '--max_iters=6', '--batch_size=2', '--eval_interval=2',
                  '--learning_rate=1e-2', '--warmup_iters=0', '--patience=9', '--dtype=float32', '--final_eval_tokens=0', cwd=home)
    assert process.returncode == 0 and f'before the first step: train {before:.4f}, validation {before:.4f}' in process.stdout, process.stderr
    assert load(home / 'here')[1]['losses']['validation'] < before and load(home / 'here')[1]['tokenizer']['characters'] == characters
    one_line(run('train.py', '--init_from=resume', '--dataset=nano_char', '--out_dir=out', cwd=home), 1, 'a checkpoint of folio is wanted')


def test_a_pickle_is_no_way_in(folder):
    os.makedirs(folder / 'data/evil')
    np.arange(60, dtype='<u2').tofile(folder / 'data/evil/train.bin')
    (folder / 'data/evil/meta.pkl').write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    one_line(run('train.py', '--dataset=evil', '--out_dir=out/evil', cwd=folder), 1, 'meta.pkl', 'not nanoGPT')
    assert not (folder / 'pwned').exists()


@pytest.mark.parametrize('kind', ['model_state_dict.pth of nanoGPT', 'model.pt of nanoGPT', 'model.pt of Hugging Face'])
def test_bare_weights_load(tmp_path, capsys, kind):
    name = kind.split()[0]
    if 'nanoGPT' in kind:
        contents, made = nanogpt(50257, n_embd=128)
        weights = {key.removeprefix('_orig_mod.'): w for key, w in contents['model'].items()}
        torch.save({'model_state_dict': weights} if 'pth' in kind else weights, tmp_path / name)
    else:
        made = theirs(tmp_path, n_embd=128)
        torch.save(made.state_dict(), tmp_path / name)
    if name == 'model.pt':
        (tmp_path / 'config.json').write_text(json.dumps(dict(vocab_size=50257, n_embd=128, n_layer=2, n_head=4 if 'Hugging' in kind else 2)))
    model, meta = load(tmp_path / name)
    assert ('taken for 2 of 64' in capsys.readouterr().err) == (name != 'model.pt')
    idx = torch.randint(50257, (2, 20))
    with torch.no_grad():
        logits = made(idx)
        assert (model(idx) - getattr(logits, 'logits', logits)).abs().max() < 1e-4
    assert meta['tokenizer']['name'] == 'gpt2'


@pytest.fixture(scope='session')
def whole(tmp_path_factory):
    """A small model in Hugging Face's format, with GPT-2's vocabulary."""
    pytest.importorskip('safetensors', reason='pip install safetensors')
    path = tmp_path_factory.mktemp('whole')
    save(path / 'model.pt', GPT(GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=8)), GPT2Tokenizer().meta, step=1)
    process = run('quantize.py', '--format=hf', '--checkpoint=model.pt', cwd=path)
    assert process.returncode == 0, process.stderr
    return path / 'hf'


def with_header(header):
    return lambda file: len(header).to_bytes(8, 'little') + header


@pytest.mark.parametrize('file, change, words', [
    ('config.json', dict(model_type='llama'), "model_type 'llama'"), ('config.json', dict(n_layer=10**9), 'n_layer 1000000000'),
    ('config.json', dict(n_head=3), 'n_head 3'), ('config.json', dict(n_positions=10**12), 'n_positions'), ('config.json', dict(n_head='x'), "'x'"),
    ('config.json', dict(activation_function='gelu'), "'gelu'"), ('config.json', b'{', 'config.json is damaged'),
    ('config.json', dict(folio=7), 'damaged'), ('vocab.json', {f'token {i}': i for i in range(50257)}, "vocabulary is not GPT-2's"),
    ('model.safetensors', lambda file: file[:-50], 'damaged'), ('model.safetensors', lambda file: file[:50], 'damaged'), ('model.safetensors', b'', 'damaged'),
    ('model.safetensors', lambda file: (2**43).to_bytes(8, 'little') + file[8:], 'damaged'),
    ('model.safetensors', with_header(json.dumps({'wte.weight': dict(dtype='F32', shape=[10**9, 10**6], data_offsets=[0, 4 * 10**15])}).encode()), 'damaged'),
    ('weights', {'h.1.mlp.c_fc.weight': None}, 'lacks h.1.mlp.c_fc.weight'), ('weights', {'wte.weight': None}, 'lacks wte.weight'),
    ('weights', {'h.1.mlp.c_fc.weight': torch.zeros(8, 9)}, r'h.1.mlp.c_fc.weight is \(9, 8\)'), ('weights', {'wpe.weight': torch.zeros(16)}, 'wpe.weight is'),
    ('weights', {'wte.weight': torch.zeros(())}, 'damaged'), ('weights', {'h.1.ln_1.bias': torch.full((8,), math.nan)}, 'h.1.ln_1.bias is not finite'), ('weights', {'ln_f.bias': torch.zeros(8, dtype=torch.int8)}, 'ln_f.bias is .* of int8'),
    ('weights', {'h.0.crossattention.q_attn.weight': torch.zeros(8, 8)}, "is not GPT-2's")], ids=lambda value: value if isinstance(value, str) else '')
def test_bad_hugging_face_folders_are_refused(whole, tmp_path, file, change, words):
    from safetensors.torch import load_file, save_file
    out = tmp_path / 'hf'
    shutil.copytree(whole, out)
    if file == 'weights':
        weights = load_file(out / 'model.safetensors')
        weights.update({f'transformer.{name}': w for name, w in change.items()})
        save_file({name: w for name, w in weights.items() if w is not None}, out / 'model.safetensors')
    elif isinstance(change, dict):
        (out / file).write_text(json.dumps({**json.loads((out / file).read_text()), **change} if file == 'config.json' else change))
    else:
        (out / file).write_bytes(change((out / file).read_bytes()) if callable(change) else change)
    with pytest.raises(ValueError, match=words):
        load(out)
    if file == 'config.json':
        one_line(run('train.py', '--init_from=hf', '--out_dir=out', cwd=tmp_path), 1, 'train.py: ', 'hf')


def test_without_safetensors_the_error_is_its_command(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(model, 'HAS_SAFETENSORS', False)
    with pytest.raises(ValueError, match='pip install safetensors'):
        load(whole)
    shutil.copytree(whole, tmp_path / 'hf')
    torch.save(load_weights(whole), tmp_path / 'hf/pytorch_model.bin')
    assert load(tmp_path / 'hf')[1]['path'].endswith('pytorch_model.bin')


def load_weights(path):
    from safetensors.torch import load_file
    return load_file(path / 'model.safetensors')


@pytest.mark.parametrize('repository', ['gpt2', 'someone/their-gpt2'])
def test_a_hub_id_is_loaded_from_its_cache_or_refused(folder, whole, tmp_path, monkeypatch, repository):
    pytest.importorskip('huggingface_hub', reason='pip install gradio')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    args = ['--init_from=' + repository, '--out_dir=out/hub' + repository.replace('/', '_'), '--dataset=bpe', '--seq_len=16', '--max_iters=2', '--batch_size=2']
    process = run('train.py', 'config/finetune.py', *args, cwd=folder)
    one_line(process, 1, repository, 'not to be had from the Hub', 'connect')
    cache = tmp_path / f"models--{repository.replace('/', '--')}"
    (cache / 'refs').mkdir(parents=True)
    (cache / 'refs/main').write_text('1' * 40)
    shutil.copytree(whole, cache / 'snapshots' / ('1' * 40))
    process = run('train.py', 'config/finetune.py', *args, '--eval_interval=1', '--final_eval_tokens=100', cwd=folder)
    assert process.returncode == 0 and 'before the first step' in process.stdout and 'parameters, step 1' in process.stderr, process.stderr
    process = run('quantize.py', f'--checkpoint={repository}', cwd=folder)
    assert process.returncode == 0 and (folder / 'out' / os.path.basename(repository) / 'model_int8.pt').exists(), process.stderr


def test_fine_tuning_keeps_the_best_and_warns(folder):
    """From a model that knows its text, at a rate that ruins it: best.pt is the parent, and one is told to deploy that."""
    args = [*TINY_RUN, '--dataset=wide', '--n_embd=128', '--max_iters=200', '--learning_rate=5e-3', '--warmup_iters=1', '--val_fraction=0.2', '--eval_interval=50']
    process = run('train.py', *args, '--out_dir=out/parent', cwd=folder)
    assert process.returncode == 0 and 'learnt by heart' in process.stdout, process.stderr
    process = run('train.py', *args, '--init_from=out/parent', '--out_dir=out/ruined', '--learning_rate=1', '--min_lr=1', '--eval_interval=2',
                  '--patience=2', '--grad_clip=0', cwd=folder)
    assert process.returncode == 0 and 'no better validation loss in 2 evaluations' in process.stdout, process.stderr
    assert 'validation at step 0, kept in' in process.stdout and '--checkpoint=out/ruined/best.pt' in process.stdout
    (folder / 'mine.txt').write_text('The cat sat.\n' * 40)
    args = ['--init_from=auto:out/parent', '--input=mine.txt', '--dataset=mine', '--out_dir=out/mine', '--batch_size=4', '--eval_interval=1', '--log_interval=1']
    for steps, words in ((2, 'a new run from out/parent'), (4, 'step 2, up to step 4')):  # in the parent's characters, then on
        process = run('train.py', *args, f'--max_iters={steps}', cwd=folder)
        assert process.returncode == 0 and words in process.stdout, process.stderr
    assert load(folder / 'out/mine')[1]['tokenizer'] == load(folder / 'out/parent')[1]['tokenizer']
    (folder / 'mine.txt').write_text('The cat @')
    process = run('train.py', *args, '--out_dir=out/refused', '--dataset=refused', cwd=folder)
    assert process.returncode == 1 and "'@' is not in the char vocabulary" in process.stderr and not (folder / 'data/refused').exists()
    parent, best = load(folder / 'out/parent')[0], load(folder / 'out/ruined/best.pt')[0]
    assert all(torch.equal(a, b) for a, b in zip(parent.parameters(), best.parameters()))


# tokens ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def reference(tmp_path_factory):
    """tiktoken's own r50k_base, GPT-2's vocabulary: our file stands in its cache, and it checks the hash."""
    path = os.path.join(HERE, 'data', 'gpt2.tiktoken')
    cache = tmp_path_factory.mktemp('tiktoken')
    url = 'https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken'
    shutil.copy(path, cache / hashlib.sha1(url.encode()).hexdigest())
    os.environ['TIKTOKEN_CACHE_DIR'] = str(cache)
    return tiktoken.get_encoding('r50k_base')


def random_text(rng, length):
    alphabets = ['abc THE the ', ' \n\t', "'s't1290!?<|endoftext|>", 'éß日本語한국', '🎭👩‍👩‍👧', '\x00\x1c\x1f\x85\xa0\u2028\u3000']
    return ''.join(rng.choice(rng.choice(alphabets)) * rng.choice((1, 1, 1, 5)) for _ in range(length))


def test_tokens_equal_tiktoken(reference):
    ours = GPT2Tokenizer()
    text = open(os.path.join(HERE, 'input.txt'), encoding='utf-8', newline='').read()
    assert ours.encode(text) == reference.encode_ordinary(text)
    assert (ours.eot, ours.vocab_size) == (reference.eot_token, reference.n_vocab)
    assert ours.encode('a<|endoftext|>b', special_tokens=True) == reference.encode('a<|endoftext|>b', allowed_special='all')
    for seed in range(100):
        text = random_text(random.Random(seed), 300)
        assert ours.encode(text) == reference.encode(text, disallowed_special=())
        assert ours.decode_bytes(ours.encode(text)) == text.encode()
    assert [ours.decode_bytes([i]) for i in range(50257)] == [reference.decode_bytes([i]) for i in range(50257)]
    assert ours.decode_bytes(ours.encode('\ud800')) == '\ufffd'.encode()  # a lone surrogate is no Unicode


def test_pieces_encode_as_the_whole(reference):
    for seed in range(100):
        rng = random.Random(seed)
        text = random_text(rng, 400)
        blocks, at = [], 0
        while at < len(text):
            size = rng.choice((1, 7, 50, 200))
            blocks.append(text[at:at + size])
            at += size
        pieces = list(cut_exactly(blocks))
        assert ''.join(pieces) == text
        assert [i for piece in pieces for i in reference.encode_ordinary(piece)] == reference.encode_ordinary(text)


def test_a_stream_is_whole_characters_up_to_its_stop():
    class Bytes:
        eot = 256

        def decode_bytes(self, ids):
            return bytes(ids)

    def said(contents, stop=''):
        stream, parts = TextStream(Bytes(), stop), []
        for id in contents:
            parts.append(stream.feed(id))
            assert not stop or stop[0] not in parts[-1] or stop not in ''.join(parts)
        return ''.join(parts) + stream.rest(), stream.ended
    text = 'é日本🎭e\u0301'
    assert said(text.encode()) == (text, '')
    assert said(text.encode()[:-1]) == (text[:-1], '')  # cut inside a character: nothing of it
    assert said(b'ab\xffc') == ('ab\ufffdc', '')
    assert said(b'one END two', 'END') == ('one ', 'stop string')
    assert said('日本🎭!'.encode(), '🎭') == ('日本', 'stop string')
    assert said(b'EEN EN', 'END') == ('EEN EN', '')  # held back, not lost
    assert said(b'EEND', 'END') == ('E', 'stop string')
    assert said([*b'ab', 256, *b'cd'], 'bc') == ('ab', 'end of text')


@pytest.mark.parametrize('blank', [' ', '\n', '\u3000'])
def test_a_million_blanks_are_tokens(reference, blank):
    """tiktoken itself panics there; its tokens for a shorter run show the pattern."""
    ours = GPT2Tokenizer()
    for text in ('a' + blank * 150_000 + 'b', blank * 150_000, 'x' + blank * 150_000):
        assert ours.encode(text) == reference.encode_ordinary(text)
    text = 'a' + blank * 2_000_000 + 'b'
    assert ours.decode_bytes(ours.encode(text)) == text.encode()


def test_char_tokenizer():
    tokenizer = CharTokenizer('hello\n🎭日')
    assert tokenizer.vocab_size == 7 and tokenizer.eot is None
    assert tokenizer.decode_bytes(tokenizer.encode('hole🎭日')) == 'hole🎭日'.encode()
    assert tokenizer.encode('\nh') == [tokenizer.start, 2] and tokenizer.encode('') == []
    with pytest.raises(ValueError, match="'x'"):
        tokenizer.encode('hex')
    with pytest.raises(ValueError, match='70,000'):
        CharTokenizer(map(chr, range(70_000)))


def test_the_corpus_splits_as_published(tmp_path, monkeypatch, reference):
    monkeypatch.chdir(tmp_path)
    corpus = os.path.join(HERE, 'input.txt')
    assert prepare(corpus)['tokens'] == {'train': 301_966, 'val': 36_059}
    assert prepare(corpus, val_fraction=0.0)['tokens'] == {'train': 338_025}
    train, val, meta = load_data('shakespeare')
    assert val is None and sorted(os.listdir('data/shakespeare')) == ['meta.json', 'train.bin']
    text = open(corpus, encoding='utf-8', newline='').read()
    assert train.tolist() == reference.encode_ordinary(text)
    assert meta['source']['sha256'] == '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def test_folders_globs_and_document_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs('texts/sub')
    for name, text in (('a.txt', 'one'), ('sub/b.txt', 'two\r\n'), ('c.md', 'three')):
        with open(f'texts/{name}', 'w', encoding='utf-8', newline='') as f:
            f.write(text)
    ours = GPT2Tokenizer()
    prepare('texts', 'folder', val_fraction=0.0)
    assert ours.decode_bytes(load_data('folder')[0]) == b'one<|endoftext|>three<|endoftext|>two\r\n'
    prepare('texts/*', 'glob', 'char', val_fraction=0.0)
    meta = load_data('glob')[2]
    assert CharTokenizer(meta['tokenizer']['characters']).decode_bytes(load_data('glob')[0]) == b'one\nthree'
    with open('stories.txt', 'w', encoding='utf-8') as f:
        f.write('once\n<|endoftext|>\nupon')
    prepare('stories.txt', 'plain', val_fraction=0.0)
    prepare('stories.txt', 'special', val_fraction=0.0, special_tokens=True)
    assert 50256 not in load_data('plain')[0] and np.count_nonzero(load_data('special')[0] == 50256) == 1


def test_bad_texts_are_refused_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'good.txt').write_text('some words to keep')
    (tmp_path / 'bad.txt').write_bytes(b'x' * 70_000 + '🎭'.encode()[:2] + b'y')
    (tmp_path / 'empty.txt').write_text('')
    prepare('good.txt', 'kept')
    before = {name: open(f'data/kept/{name}', 'rb').read() for name in os.listdir('data/kept')}
    for name, match in (('bad.txt', 'bad.txt: not UTF-8 at byte 70,000'), ('empty.txt', 'empty'), ('none.txt', 'no such')):
        with pytest.raises((ValueError, OSError), match=match):
            prepare(name, 'kept')
    assert before == {name: open(f'data/kept/{name}', 'rb').read() for name in os.listdir('data/kept')}
    (tmp_path / 'data/kept/val.bin').write_bytes(b'123')
    with pytest.raises(ValueError, match='val.bin'):
        load_data('kept')


def test_prepare_imports_no_torch():
    subprocess.run([sys.executable, '-c', 'import sys, prepare; assert "torch" not in sys.modules'], cwd=HERE, check=True)


# settings -------------------------------------------------------------------------------------------------------------

def settings(monkeypatch, *args, **namespace):
    monkeypatch.setattr(sys, 'argv', ['script.py', *map(str, args)])
    namespace = namespace or dict(batch_size=8, lr=0.1, name='a', flag=False, compile='auto', _private=3, math=math, LIMIT=1)
    return config.configure(namespace, dict(batch_size=(1, 99)) if 'batch_size' in namespace else {}), namespace


def test_settings_apply_in_order(monkeypatch, tmp_path):
    (tmp_path / 'one.py').write_text('import math\n_half = batch_size // 2\nbatch_size = _half\ndef f(): return lr\n'
                                     'lr = 2 * f()\ncompile = False\n', encoding='utf-8')
    result, namespace = settings(monkeypatch, '--batch_size=10', tmp_path / 'one.py', '--name', 'x=y', '--flag', '--lr=1e-3')
    assert result == dict(batch_size=5, lr=0.001, name='x=y', flag=True, compile='False')
    assert namespace['batch_size'] == 5 and config.given == {'batch_size', 'name', 'flag', 'lr', 'compile'}
    assert settings(monkeypatch, '--lr=3', '--flag', 'False', '--name=')[0] == dict(
        batch_size=8, lr=3.0, name='', flag=False, compile='auto')
    assert settings(monkeypatch)[0]['flag'] is False and not config.given


@pytest.mark.parametrize('args, words', [
    (['--batchsize=3'], ['batchsize', "'batch_size'"]), (['--batch_size=x'], ['batch_size', 'int', "'x'"]),
    (['--batch_size=1e3'], ['int']), (['--batch_size=True'], ['int']), (['--lr=True'], ['float']), (['--flag=1'], ['bool']),
    (['--batch_size'], ['needs a value']), (['--name', '--flag'], ['needs a value']), (['--_private=1'], ['unknown']),
    (['--batch_size=100'], ['at most 99']), (['--batch_size=0'], ['at least 1']), (['--'], ['unknown']),
    (['nope.py'], ['nope.py', 'no such config file'])], ids=str)
def test_wrong_settings_are_refused(monkeypatch, capsys, args, words):
    with pytest.raises(SystemExit) as exit:
        settings(monkeypatch, *args)
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith('script.py: ')
    assert all(word in lines[0] for word in words), lines


@pytest.mark.parametrize('source, words', [
    ('batchsize = 3', ["'batch_size'"]), ('batch_size = 2.0', ['int', '2.0']), ('batch_size = True', ['int']), ('name = 3', ['str']),
    ('name = True', ['str']), ('x = [1]', ['unknown']), ('batch_size = print', ['int']), ('a b', ['line 1', 'SyntaxError']),
    ('\nlr = nope', ['line 2', 'nope'])])
def test_wrong_config_files_are_refused(monkeypatch, capsys, tmp_path, source, words):
    (tmp_path / 'c.py').write_text(source)
    with pytest.raises(SystemExit) as exit:
        settings(monkeypatch, tmp_path / 'c.py')
    line = capsys.readouterr().err
    assert exit.value.code == 2 and 'c.py' in line and all(word in line for word in words), line


@pytest.mark.parametrize('script', ['prepare.py', 'train.py', 'sample.py'])
def test_help_is_the_source(script, tmp_path):
    process = run(script, '--help', cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == ''
    source = open(os.path.join(HERE, script), encoding='utf-8').read()
    assert source.split('"""')[1].strip() in process.stdout
    shown = re.findall(r'^  --(\w+)=', process.stdout, re.M)
    body = source[source.index('# run'):] if script == 'train.py' else source
    assert len(shown) >= 5 and shown == re.findall(r"^ *(\w+) = ['\w.-]+ +# ", body[:body.index('configure(globals()')], re.M)


PRESETS = sorted(name for name in os.listdir(os.path.join(HERE, 'config')) if name.endswith('.py') and name != '__init__.py')


@pytest.mark.parametrize('preset', PRESETS)
def test_presets_are_valid_and_keep_to_their_folders(preset, monkeypatch):
    source = open(os.path.join(HERE, 'train.py'), encoding='utf-8').read()
    start = source.index('# run\n')
    end = source.index('# -- ranks')
    monkeypatch.setattr(sys, 'argv', ['train.py', f'config/{preset}'])
    namespace = {'configure': config.configure, 'check_dataset': check_dataset, 'pick_device': pick_device}
    exec(source[start:end], namespace)
    if preset == 'shakespeare.py':
        assert namespace['out_dir'] == 'out'
    else:
        assert namespace['out_dir'] == ('' if preset == 'bench.py' else f"out/{preset[:-3]}")
    if re.search(r'_b\d|int8', preset):
        assert namespace['val_fraction'] == 0 and namespace['shift_windows'] is False


# the scripts, as a user runs them -------------------------------------------------------------------------------------

def log_of(out):
    with open(out / 'log.csv', encoding='utf-8', newline='') as f:
        rows = list(csv.DictReader(f))
    return [{key: row[key] for key in ('step', 'loss', 'grad_norm', 'lr', 'train_loss', 'val_loss')} for row in rows]


def test_train_reports_and_writes(folder):
    out, text = folder / 'out/tiny', (folder / 'stdout.txt').read_text(encoding='utf-8')
    assert sorted(os.listdir(out)) == ['best.pt', 'ckpt.pt', 'log.csv', 'model.pt']
    rows = log_of(out)
    assert [row['step'] for row in rows] == ['5', '10', '15', '20']
    assert [bool(row['val_loss']) for row in rows] == [False, True, False, True]
    for words in ('parameters', 'training tokens', 'steps an epoch', 'tok/s', 'mfu', 'left', 'max_iters 20 reached',
                  'at first', 'first step under', 'best', 'validation', 'train'):
        assert words in text, words
    model, meta = load(out)
    train, val, data_meta = load_data(folder / 'data/tiny')
    assert meta['step'] == 20 and meta['tokenizer'] == data_meta['tokenizer'] and meta['trained_context'] == 16
    assert abs(meta['losses']['validation'] - split_loss(model, val, 16)) < 1e-5
    for name in ('ckpt.pt', 'best.pt', 'model.pt'):
        torch.load(out / name, weights_only=True)


def test_train_refuses_to_start_over_a_run(folder):
    before = (folder / 'out/tiny/log.csv').read_bytes()
    one_line(run('train.py', *TINY_RUN, '--out_dir=out/tiny', cwd=folder), 1, '--init_from=resume', '--overwrite')
    one_line(run('train.py', '--out_dir=out/tiny', '--init_from=resume', '--n_layer=2', cwd=folder), 2, 'n_layer', '1')
    one_line(run('train.py', '--out_dir=out/tiny', '--init_from=resume', '--optimizer=muon', cwd=folder), 2, 'optimizer', 'adamw')
    assert (folder / 'out/tiny/log.csv').read_bytes() == before


@pytest.mark.parametrize('args, status, words', [
    (['--learning_rat=1'], 2, ['learning_rate']), (['--max_iters=many'], 2, ['int']), (['--n_head=3'], 2, ['n_embd', 'n_head']),
    (['--seq_len=99'], 2, ['seq_len', '16']), (['--schedule=cosin'], 2, ['cosine']), (['--device=tpu'], 2, ['tpu']),
    (['--tokenizer=gpt2'], 2, ['char', 'gpt2']), (['--val_fraction=0.5'], 2, ['0.1', '0.5']),
    (['--input=other.txt'], 2, ['input.txt', 'other.txt']), (['--input=none.txt'], 1, ['none.txt']),
    (['--block_size=5000'], 1, ['seq_len 5000']), (['--init_from=resume'], 1, ['nothing to resume']),
    (['--init_from=nope.pt'], 1, ['nope.pt']), (['--dataset=../x'], 2, ['below data/']), (['--device=meta'], 2, ['meta']),
    (['--patience=1', '--eval_interval=0'], 2, ['eval_interval']), (['--n_embd=100000000000'], 1, ['out of memory', '--batch_size'])], ids=lambda value: str(value[0]) if isinstance(value, list) else '')
def test_train_refuses_in_one_line(folder, args, status, words):
    (folder / 'other.txt').write_text('another text')
    one_line(run('train.py', *TINY_RUN, '--out_dir=out/none', *args, cwd=folder), status, 'train.py: ', *words)
    assert not (folder / 'out/none').exists()


def same_run(a, b):
    """Weights, optimizer and log equal to the bit, timings aside."""
    one, two = read(a / 'ckpt.pt'), read(b / 'ckpt.pt')
    assert log_of(a) == log_of(b)
    assert one['model'].keys() == two['model'].keys() and all(torch.equal(one['model'][k], two['model'][k]) for k in one['model'])
    for kept, other in zip(one['optimizers'], two['optimizers'], strict=True):
        for i, moments in kept['state'].items():
            assert all(torch.equal(moments[k], other['state'][i][k]) for k in moments)
    drop = ('seconds', 'log_bytes')
    assert {k: v for k, v in one['state'].items() if k not in drop} == {k: v for k, v in two['state'].items() if k not in drop}


def test_a_killed_run_resumes_to_the_bit(folder):
    """SIGKILL, SIGTERM and SIGINT at whatever moment, each resumed, against a run never stopped. Dropout included."""
    args = [*TINY_RUN, '--max_iters=1500', '--dropout=0.1', '--eval_interval=100', '--checkpoint_interval=50']
    assert run('train.py', *args, '--out_dir=out/whole', cwd=folder).returncode == 0
    for i, (number, status) in enumerate(((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130))):
        process = subprocess.Popen([sys.executable, os.path.join(HERE, 'train.py'), *args, '--out_dir=out/cut', '--init_from=auto'],
                                   cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith('step ') and int(line.split()[1].split('/')[0].replace(',', '')) > 300 * (i + 1):
                break
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == status, error
        assert status < 0 or '--init_from=resume' in error
    process = run('train.py', '--out_dir=out/cut', '--init_from=resume', cwd=folder)
    assert process.returncode == 0, process.stderr
    same_run(folder / 'out/whole', folder / 'out/cut')


def test_a_resumed_run_takes_new_settings_and_its_report_is_of_all_of_it(folder):
    shutil.copytree(folder / 'out/tiny', folder / 'out/more')
    process = run('train.py', '--out_dir=out/more', '--init_from=resume', '--max_iters=23', '--weight_decay=0.5', '--log_interval=0',
                  '--eval_interval=0', cwd=folder)
    assert process.returncode == 0, process.stderr
    kept = read(folder / 'out/more/ckpt.pt')
    assert kept['optimizers'][0]['param_groups'][0]['weight_decay'] == 0.5 and kept['state']['seconds'] > 0
    assert f"{sum(kept['state']['recent']) / len(kept['state']['recent']):.4f} at last" in process.stdout  # the last 3 steps too


def test_a_reader_that_goes_away_loses_nothing(folder):
    process = subprocess.Popen([sys.executable, os.path.join(HERE, 'train.py'), *TINY_RUN, '--out_dir=out/head', '--log_interval=1',
                                '--checkpoint_interval=0'], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith('step 1'):
        pass
    process.stdout.close()
    assert process.wait(60) == 1 and 'Broken pipe' in process.stderr.read()
    assert read(folder / 'out/head/ckpt.pt')['step'] > 0


def test_logging_and_evaluating_do_not_change_the_weights(folder):
    args = [*TINY_RUN, '--out_dir=out/quiet', '--log_interval=0', '--eval_interval=0', '--sample_interval=7']
    assert run('train.py', *args, cwd=folder).returncode == 0
    quiet, loud = load(folder / 'out/quiet')[0], load(folder / 'out/tiny')[0]
    assert all(torch.equal(a, b) for a, b in zip(quiet.state_dict().values(), loud.state_dict().values()))


@pytest.mark.parametrize('schedule', ['cosine', 'onecycle'])
def test_learning_rates_equal_the_published_formulas(folder, schedule):
    """Reference run D's published rule, scaled to 50 steps; torch's OneCycleLR for run E."""
    args = [*TINY_RUN, f'--schedule={schedule}', '--max_iters=50', '--warmup_iters=5', '--min_lr=0', '--learning_rate=3e-4',
            '--log_interval=1', '--eval_interval=0', '--checkpoint_interval=0', f'--out_dir=out/{schedule}']
    assert run('train.py', *args, cwd=folder).returncode == 0
    rates = [float(row['lr']) for row in log_of(folder / 'out' / schedule)]
    if schedule == 'cosine':
        want = [3e-4 * (i + 1) / 5 if i < 5 else 1.5e-4 * (1 + math.cos(math.pi * (i - 5) / 45)) for i in range(50)]
    else:
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, total_steps=50)
        want = []
        for _ in range(50):
            want.append(optimizer.param_groups[0]['lr'])
            optimizer.step()
            if len(want) < 50:
                scheduler.step()
        beta1 = read(folder / 'out/onecycle/ckpt.pt')['optimizers'][0]['param_groups'][0]['betas'][0]
        assert abs(beta1 - optimizer.param_groups[0]['betas'][0]) < 1e-9
    assert np.abs(np.array(rates) - want).max() < 1e-9


def test_accumulation_equals_a_larger_batch(folder):
    for name, args in (('one', ['--batch_size=8']), ('two', ['--batch_size=4', '--gradient_accumulation_steps=2'])):
        assert run('train.py', *TINY_RUN, f'--out_dir=out/{name}', *args, cwd=folder).returncode == 0
    one, two = (log_of(folder / 'out' / name) for name in ('one', 'two'))
    assert all(abs(float(a['loss']) - float(b['loss'])) < 1e-4 for a, b in zip(one, two)) and len(one) == 4


def torchrun(ranks, *args, cwd, restarts=0):
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}',
                             f'--max-restarts={restarts}',
                             os.path.join(HERE, 'train.py'), *args], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize('share', [['--batch_size=8'], ['--batch_size=2', '--gradient_accumulation_steps=4']], ids=['batch', 'accumulation'])
def test_ranks_see_what_one_process_sees(folder, share):
    logs = []
    for ranks in (1, 2, 4) if len(share) == 1 else (1, 2):
        out = f'out/ranks_{ranks}_{len(share)}'
        process = torchrun(ranks, *TINY_RUN, '--log_interval=1', *share, f'--out_dir={out}', cwd=folder)
        _, error = process.communicate(timeout=100)
        assert process.returncode == 0, error
        logs.append(log_of(folder / out))
    for other in logs[1:]:
        for a, b in zip(logs[0], other, strict=True):
            assert all(abs(float(a[key] or 0) - float(b[key] or 0)) < 1e-5 for key in ('loss', 'train_loss', 'val_loss'))


def test_ranks_that_cannot_share_are_refused(folder):
    error = torchrun(3, *TINY_RUN, '--out_dir=out/none', cwd=folder).communicate(timeout=100)[1]
    assert 'train.py: 3 ranks cannot share batch_size 4' in error and not (folder / 'out/none').exists()


def child(process, number):
    """The process id of torchrun's rank `number`."""
    with open(f'/proc/{process.pid}/task/{process.pid}/children', encoding='utf-8') as f:
        return int(f.read().split()[number])


@pytest.mark.skipif(not os.path.exists('/proc/self/task'), reason='finds the ranks through /proc')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL], ids=['SIGTERM', 'SIGKILL'])
def test_one_rank_stopped_or_killed(folder, number):
    """SIGTERM to one stops all, saved; after SIGKILL torchrun starts all again, and init_from=auto goes on."""
    out = f'out/one_{number}'
    killed = number == signal.SIGKILL
    process = torchrun(2, *TINY_RUN, '--init_from=auto', f'--out_dir={out}', '--checkpoint_interval=20', '--log_interval=20',
                       '--eval_interval=0', f'--max_iters={2000 if killed else 10**6}', cwd=folder, restarts=int(killed))
    for line in process.stdout:
        if line.startswith('step 100/'):
            break
    os.kill(child(process, 1), number)
    _, error = process.communicate(timeout=100)
    checkpoint = read(folder / out / 'ckpt.pt')
    if killed:
        assert process.returncode == 0 and checkpoint['step'] == 2000, error
        assert [int(row['step']) for row in log_of(folder / out)] == list(range(20, 2001, 20))
    else:
        assert process.returncode != 0 and error.count('SIGTERM at step') == 1 and 'exitcode: 143' in error, error


def test_a_signal_saves_within_two_seconds_even_in_a_long_step(folder):
    """Half a minute of accumulation a step: the state saved is the last whole step's."""
    args = ['--n_layer=2', '--n_head=2', '--n_embd=64', '--block_size=64', '--batch_size=64', '--tokenizer=char', '--dataset=tiny',
            '--gradient_accumulation_steps=2000', '--dtype=float32', '--out_dir=out/long']
    process = subprocess.Popen([sys.executable, os.path.join(HERE, 'train.py'), *args], cwd=folder, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONUNBUFFERED': '1'})
    while 'a new run from scratch' not in process.stdout.readline():
        pass
    time.sleep(1)
    began = time.time()
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and 'step 0' in error and time.time() - began < 2, error
    assert read(folder / 'out/long/ckpt.pt')['step'] == 0


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['SIGINT', 'SIGTERM'])
def test_a_signal_before_the_loop_ends_the_run_as_in_it(folder, number):
    """And the same command goes on to the bit."""
    code = f"""
import os, runpy, sys, time, model
def device_name(device):  # what the run prints before its first step
    os.kill(os.getpid(), {int(number)})
    time.sleep(60)
model.device_name = device_name
sys.argv[0] = 'train.py'
runpy.run_path({os.path.join(HERE, 'train.py')!r}, run_name='__main__')"""
    args = [*TINY_RUN, '--init_from=auto', f'--out_dir=out/before{int(number)}']
    process = subprocess.run([sys.executable, '-c', code, *args], cwd=folder, capture_output=True, text=True,
                             env={**os.environ, 'PYTHONPATH': HERE}, timeout=100)
    assert process.returncode == 128 + number and 'at step 0' in process.stderr, process.stderr
    assert run('train.py', *args, cwd=folder).returncode == 0
    same_run(folder / 'out/tiny', folder / f'out/before{int(number)}')


def test_compile_without_a_compiler_goes_on_eagerly(folder, monkeypatch):
    monkeypatch.setenv('CXX', '/nonexistent')
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(folder / 'inductor'))
    process = run('train.py', *TINY_RUN, '--out_dir=out/eager', '--compile=True', cwd=folder)
    assert process.returncode == 0 and process.stderr.count('going on eagerly') == 1, process.stderr
    assert log_of(folder / 'out/eager') == log_of(folder / 'out/tiny')


def test_gradient_checkpointing_and_no_folder(folder):
    """Recomputing changes no number; an empty out_dir writes nothing."""
    process = run('train.py', *TINY_RUN, '--out_dir=', '--gradient_checkpointing', '--dropout=0.1', cwd=folder)
    other = run('train.py', *TINY_RUN, '--out_dir=', '--dropout=0.1', cwd=folder)
    assert process.returncode == other.returncode == 0, process.stderr
    losses = [re.findall(r'loss (\d\.\d+)  best (\d\.\d+)', p.stdout) for p in (process, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert not [name for name in os.listdir(folder) if name.endswith('.pt')]


def test_time_and_patience_stop_a_run(folder):
    args = [*TINY_RUN, '--max_iters=10000000', '--eval_interval=50', '--log_interval=0', '--checkpoint_interval=0']
    process = run('train.py', *args, '--out_dir=out/minutes', '--max_minutes=0.02', cwd=folder)
    assert process.returncode == 0 and '0.02 minutes over' in process.stdout, process.stderr
    process = run('train.py', *args, '--out_dir=out/patience', '--learning_rate=0', '--min_lr=0', '--patience=2', cwd=folder)
    assert process.returncode == 0 and 'in 2 evaluations' in process.stdout, process.stderr
    assert load(folder / 'out/patience')[1]['step'] == 150


def test_the_threshold_stops_the_run_and_a_model_can_start_another(folder):
    args = [*TINY_RUN, '--max_iters=5000', '--learning_rate=1e-2', '--loss_threshold=1.5', '--warmup_iters=1', '--min_lr=1e-2',
            '--log_interval=0', '--eval_interval=0']
    process = run('train.py', *args, '--out_dir=out/threshold', cwd=folder)
    assert process.returncode == 0 and 'under 1.5' in process.stdout, process.stderr
    state = read(folder / 'out/threshold/ckpt.pt')['state']
    assert state['step'] % 10 == 0 and sum(state['recent']) / len(state['recent']) < 1.5
    process = run('train.py', *TINY_RUN, '--init_from=out/threshold', '--out_dir=out/tuned', '--max_iters=5', cwd=folder)
    assert process.returncode == 0, process.stderr
    assert read(folder / 'out/tuned/ckpt.pt')['state']['first_loss'] < 1.8


def test_a_run_that_blows_up_keeps_its_last_checkpoint(folder):
    args = [*TINY_RUN, '--out_dir=out/nan', '--learning_rate=999', '--min_lr=999', '--warmup_iters=0', '--max_iters=4000',
            '--grad_clip=0', '--weight_decay=900', '--checkpoint_interval=1', '--log_interval=0', '--eval_interval=0']
    one_line(run('train.py', *args, cwd=folder), 1, 'blown up', '--learning_rate')
    weights = read(folder / 'out/nan/ckpt.pt')['model']
    assert all(p.isfinite().all() for p in weights.values())


def test_sample_prints_the_text_alone(folder):
    process = run('sample.py', '--start=The cat', '--max_new_tokens=30', '--num_samples=2', cwd=folder)  # out/'s newest run
    assert process.returncode == 0, process.stderr
    texts = process.stdout.split('\n---------------\n')
    assert len(texts) == 2 and all(text.startswith('The cat') for text in texts)
    assert 'tokens/s' in process.stderr and 'parameters, step' in process.stderr and '\ufffd' not in process.stdout
    assert process.stdout == run('sample.py', '--start=The cat', '--max_new_tokens=30', '--num_samples=2', cwd=folder).stdout
    (folder / 'prompt.txt').write_text('日本 🎭', encoding='utf-8')
    process = run('sample.py', '--start=FILE:prompt.txt', '--temperature=0', '--max_new_tokens=5', '--checkpoint=out/tiny', cwd=folder)
    assert process.stdout.startswith('日本 🎭') and len(process.stdout) == len('日本 🎭') + 5 + 1
    assert run('sample.py', '--checkpoint=out/tiny/best.pt', cwd=folder).returncode == 0  # an empty prompt
    process = run('sample.py', '--interactive', '--checkpoint=out/tiny', '--stop=t', '--temperature=0.5', '--num_samples=2', cwd=folder,
                  stdin='The \n@\nmat; ' + 'cat ' * 20)
    assert process.returncode == 0 and process.stderr.count('Prompt> ') == 4 and "'@' is not in" in process.stderr, process.stderr
    assert 'it sees the end' in process.stderr
    first, _, second, _ = re.split('\n---------------\n|\n(?=mat)', process.stdout)
    assert first.startswith('The ') and second.startswith('mat; cat ') and 't' not in first[4:]
    piped = run('sample.py', '--start=-', '--checkpoint=out/tiny', '--max_new_tokens=5', cwd=folder, stdin='日本')
    assert piped.stdout == run('sample.py', '--start=日本', '--checkpoint=out/tiny', '--max_new_tokens=5', cwd=folder).stdout
    process = run('sample.py', '--start=cat.<|endoftext|>', '--temperature=1e-300', '--checkpoint=out/tiny', cwd=folder)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize('args, status, words', [
    (['--top_p=1.5'], 2, ['at most 1']), (['--repetition_penalty=0'], 2, ['at least']), (['--min_p=-1'], 2, ['at least 0']),
    (['--tempratur=1'], 2, ['temperature']), (['--top_k=x'], 2, ['int']), (['--temperature=-1'], 2, ['at least 0']),
    (['--temperature=nan'], 2, ['nan']), (['--checkpoint=none'], 1, ['none', 'quickstart']), (['--checkpoint=input.txt'], 1, ['damaged']),
    (['--start=FILE:none.txt'], 1, ['none.txt']), (['--start=FILE:latin.txt'], 1, ['not UTF-8']), (['--start=@'], 1, ["'@'"]),
    (['--context=17'], 2, ['16']), (['--device=tpu'], 2, ['tpu'])], ids=lambda value: str(value[0]) if isinstance(value, list) else '')
def test_sample_refuses_in_one_line(folder, args, status, words):
    (folder / 'latin.txt').write_bytes('é'.encode('latin-1'))
    process = run('sample.py', '--checkpoint=out/tiny', *args, cwd=folder)
    process.stderr = '\n'.join(line for line in process.stderr.splitlines() if 'parameters, step' not in line)
    one_line(process, status, 'sample.py: ', *words)
    assert process.stdout == ''


@pytest.mark.parametrize('args, status, words', [
    (['--datset=x'], 2, ['dataset']), (['--val_fraction=one'], 2, ['float']), (['--val_fraction=1'], 2, ['at most']),
    (['--input=none'], 1, ['none']), (['--tokenizer=bpe'], 2, ['gpt2, char']), (['--dataset='], 2, ['below data/']),
    (['--tokenizer=char', '--special_tokens'], 2, ['no document end'])], ids=lambda value: str(value[0]) if isinstance(value, list) else '')
def test_prepare_refuses_in_one_line(folder, args, status, words):
    one_line(run('prepare.py', *args, cwd=folder), status, 'prepare.py: ', *words)


def test_prepare_as_a_user_runs_it(folder):
    process = run('prepare.py', '--tokenizer=char', '--dataset=again', '--val_fraction=0.25', cwd=folder)
    assert process.returncode == 0 and 'data/again/val.bin' in process.stdout, process.stderr
    meta = json.loads((folder / 'data/again/meta.json').read_text(encoding='utf-8'))
    assert meta['tokens'] == {'train': 1440, 'val': 480} and meta['tokenizer']['vocab_size'] == len(set((folder / 'input.txt').read_text(encoding='utf-8')))


def test_bins_of_nanogpt_train(folder):
    """Without a meta.json the ids are taken for GPT-2's."""
    os.makedirs(folder / 'data/nano')
    np.arange(200, dtype='<u2').tofile(folder / 'data/nano/train.bin')
    process = run('train.py', '--dataset=nano', '--out_dir=out/nano', *[a for a in TINY_RUN if 'tokenizer' not in a and 'dataset' not in a],
                  '--max_iters=2', cwd=folder)
    assert process.returncode == 0 and 'the training split stands in' in process.stdout, process.stderr
    assert load(folder / 'out/nano')[1]['tokenizer'] == {'name': 'gpt2', 'vocab_size': 50257}


# the page -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def page(folder):
    """A running app.py on the tiny model: its address."""
    pytest.importorskip('gradio_client', reason='pip install gradio')
    shutil.copytree(folder / 'out/tiny', folder / 'served')
    process = subprocess.Popen([sys.executable, os.path.join(HERE, 'app.py'), '--checkpoint=served', '--port=7890', '--max_prompt=500', '--queue_size=4',
                                '--max_tokens=5000'],
                               cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if 'http://' in line:
            break
    else:
        raise AssertionError('app.py did not start')
    yield line.split()[-1]
    process.terminate()
    rest = process.communicate(timeout=30)[0]
    assert process.returncode == 143 and 'Traceback' not in rest, rest


def test_the_api_streams_and_refuses(page, folder):
    from gradio_client import Client
    client = Client(page, verbose=False)
    updates = list(client.submit('The cat', 200, seed=3, num_samples=2, api_name='/generate'))
    texts = updates[-1]
    assert len(texts) == 2 and all(text.startswith('The cat') for text in texts) and len(updates) > 1
    assert all(new.startswith(old) for old, new in zip(updates[0], texts)) and len(texts[0]) == 7 + 200
    assert client.predict('The cat', 200, seed=3, num_samples=2, api_name='/generate') == texts
    sampled = run('sample.py', '--checkpoint=served', '--start=The cat', '--max_new_tokens=200', '--seed=3', '--num_samples=2', cwd=folder)
    assert sampled.stdout == '\n---------------\n'.join(texts) + '\n'
    assert len(client.predict('The cat', 10**9, api_name='/generate')[0]) == 7 + 5000  # capped
    for wrong, words in ((dict(prompt=None), 'must be a text'), (dict(prompt='x' * 501), '500 is the most'), (dict(prompt='The', max_new_tokens='many'), 'New tokens'),
                         (dict(prompt='The', top_p=[1]), 'Top-p'), (dict(prompt='The', seed='/etc/passwd'), 'Seed'), (dict(prompt='@'), "'@' is not in the char vocabulary")):
        with pytest.raises(Exception, match=words):
            client.predict(**wrong, api_name='/generate')


def test_a_plain_call_may_leave_values_away(page):
    def call(data):
        request = urllib.request.Request(page.rstrip('/') + '/gradio_api/call/generate', json.dumps({'data': data}).encode(),
                                         {'Content-Type': 'application/json'})
        event = json.load(urllib.request.urlopen(request))['event_id']
        return urllib.request.urlopen(f"{page.rstrip('/')}/gradio_api/call/generate/{event}").read().decode()
    assert 'event: complete' in call(['The']) and 'event: complete' in call(['The', 5]) and 'event: complete' in call([])
    assert 'must be a text' in call([[1]])


def test_recited_spans_are_marked(folder, monkeypatch):
    pytest.importorskip('gradio', reason='pip install gradio')
    monkeypatch.setattr(sys, 'argv', ['app.py', '--checkpoint=out/tiny'])
    monkeypatch.chdir(folder)
    app = runpy.run_path(os.path.join(HERE, 'app.py'))
    meta = load('out/tiny')[1]
    tokenizer = CharTokenizer(meta['tokenizer']['characters'])
    known = 'on the mat; é 日本 🎭.\nThe cat sat'  # 31 characters of the corpus, over a line's end
    ids = tokenizer.encode('mmm' + known + 'mm')
    found = app['recited'](ids, meta)
    assert found.tolist() == [False] * 3 + [True] * len(known) + [False] * 2
    assert app['highlighted'](ids, 3, tokenizer, found) == f'<mark>{known}</mark>mm'
    (folder / 'out/tiny/log.csv').rename(folder / 'log.csv')  # a page must live with a log that is being written
    for text in ('', 'step,loss\n', 'no table'):
        (folder / 'out/tiny/log.csv').write_text(text)
        assert 'holds no steps' in app['look'](None, None)[4]
    steps = range(1, 3001)
    (folder / 'out/tiny/log.csv').write_text('step,loss,lr,train_loss,val_loss\n' + ''.join(f"{i},2,0.1,{'1,3' if i % 7 == 0 else ','}\n" for i in steps))
    losses, rates, source = app['curve']('out/tiny/log.csv')
    assert (losses.curve == 'validation').sum() == 3000 // 7 and rates.step.iloc[-1] == 3000 and len(rates) < 1500
    (folder / 'log.csv').replace(folder / 'out/tiny/log.csv')
    assert not app['recited'](ids[:20], meta).any() and app['recited'](ids, {**meta, 'dataset': 'none'}) is None
    escaped = app['panels']({'prompt': '<b>'}, ['ok'])
    assert '<b>' not in escaped and '&lt;b&gt;' in escaped


def test_nothing_but_the_page_is_served(page):
    for path in ('input.txt', 'served/model.pt', 'data/tiny/train.bin', '/etc/passwd', os.path.join(HERE, 'app.py')):
        for route in ('gradio_api/file=', 'file=', 'static/', 'gradio_api/proxy='):
            try:
                answer = urllib.request.urlopen(page.rstrip('/') + '/' + route + path)
            except OSError as error:  # urllib's HTTPError is one
                assert error.code >= 400
            else:
                assert b'<html' in answer.read(1000).lower()


def test_many_clients_get_their_own_text_or_a_refusal(page):
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


def test_the_page_in_a_browser(page, folder):
    playwright = pytest.importorskip('playwright.sync_api', reason='pip install playwright')
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not chromium:
        pytest.skip('no Chromium on this machine')
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        view = browser.new_page(viewport={'width': 1280, 'height': 900})
        errors, requests = [], []
        view.on('console', lambda message: errors.append(message.text) if message.type == 'error' else None)
        view.on('pageerror', lambda error: errors.append(str(error)))
        view.on('request', lambda request: requests.append(request.url))
        view.goto(page)
        view.wait_for_function("document.querySelector('#about')?.innerText.includes('parameters')")
        view.get_by_role('button', name='Once upon a time').click()
        view.wait_for_function("document.querySelector('#prompt textarea').value == 'Once upon a time'")
        view.fill('#prompt textarea', 'The mat')
        view.locator('#prompt textarea').press('Control+Enter')
        view.wait_for_function("document.querySelector('#status').innerText.includes('all tokens written')")
        view.wait_for_function("document.querySelector('#status').innerText.includes('word for word')")
        assert view.locator('.text pre').count() == 1 and view.inner_text('.text .prompt') == 'The mat'
        assert len(view.locator('.text pre').text_content()) == 7 + 100
        (folder / 'served/model_copy.pt').write_bytes((folder / 'served/model.pt').read_bytes())  # a new file turns up by itself
        view.wait_for_timeout(4000)
        view.locator('#model input').click()
        view.get_by_role('option', name='model_copy').click()
        view.wait_for_function("document.querySelector('#model input').value.includes('model_copy')")
        view.locator('input[type=number][aria-label*="New tokens"]').fill('5000')
        view.locator('#prompt textarea').click()  # leaving the field takes its number
        view.click('#generate')
        view.wait_for_function("document.querySelector('#status').innerText.includes('writing')", polling=20)
        view.wait_for_function("document.querySelector('.text pre').textContent.length > 200", polling=20)  # it grows
        view.click('#stop')
        view.wait_for_function("document.querySelector('#status').innerText.includes('stopped')")
        text = view.locator('.text pre').text_content()
        view.wait_for_timeout(500)
        assert view.locator('.text pre').text_content() == text and len(text) < 7 + 5000
        for width in (1280, 400):
            view.set_viewport_size({'width': width, 'height': 800})
            assert view.evaluate('document.documentElement.scrollWidth') <= width  # no sideways scrolling
        view.get_by_role('tab', name='Training').click()
        view.wait_for_selector('canvas, svg.marks')
        assert not errors, errors
        assert all(url.startswith((page, 'data:', 'blob:')) for url in requests), requests
        browser.close()


def test_a_page_without_a_model_waits_for_one(tmp_path):
    process = subprocess.Popen([sys.executable, os.path.join(HERE, 'app.py'), '--port=7890', '--checkpoint=' + str(tmp_path / 'out')], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    from gradio_client import Client
    for line in process.stdout:  # port 7890 may be taken by the other page: the next is said
        if 'http://' in line:
            break
    with pytest.raises(Exception, match='config/quickstart.py'):
        Client(line.split()[-1], verbose=False).predict('Hello', api_name='/generate')
    process.terminate()
    assert process.wait(30) == 143
