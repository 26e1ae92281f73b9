"""Convert a trained model for deployment: to a smaller file beside it, or a folder in Hugging Face's format.

$ python quantize.py                      # out/model.pt -> out/model_int8.pt: 498 -> 126 MB, the same loss
$ python quantize.py --dtype=int4         # -> out/model_int4.pt: 71 MB, the loss 0.1% higher
$ python quantize.py --dtype=bfloat16     # -> out/model_bfloat16.pt: the weights in 16 bits
$ python quantize.py --format=hf          # -> out/hf/, for transformers, llama.cpp and CTranslate2
$ python quantize.py --checkpoint=out/quickstart
"""
import dataclasses
import json
import os
import shlex
import sys
import timeit
from pathlib import Path

import torch

from model import LAYERS, build, keep_freed_memory, load, replacing, save, split_loss
from prepare import bits_per_nat, get_tokenizer, hugging_face_tokenizer, load_data_of, replacing_files


def convert(weights, dtype):
    """Convert a dict of float weights in place, one weight at a time, so that memory holds them once.

    Raises ValueError for a weight that is not finite, or too large for the new type.
    """
    for name in list(weights):
        w = weights.pop(name)
        if 'int' in dtype and w.dim() == 2 and name != 'wpe.weight':
            parts = [LAYERS[dtype].from_float(part.float()) for part in w.split(4096)]
            weights[name], new = map(torch.cat, zip(*parts))  # integers, scales
            weights[name.replace('weight', 'scale')] = new
        else:
            weights[name] = new = w.to(torch.float16 if 'int' in dtype else getattr(torch, dtype)).clone()
        if not new.isfinite().all():
            raise ValueError(f'{name} has weights of up to {w.abs().max():.3g}: not finite or too large for '
                             f'{dtype}; take an earlier model or --dtype=bfloat16')


def measure(model, name, tokens, max_tokens, tokenizer):
    """A model's loss over `tokens`, unless they are None, and its speed, as a dict {table row: number}."""
    start, steps, numbers = torch.tensor([[tokenizer.start]]), min(64, model.trained_context), {}
    if tokens is not None:
        loss = split_loss(model, tokens, model.trained_context, max_tokens, f'loss of {name}')
        numbers = {'loss': loss, 'bits per byte': loss * bits_per_nat(tokens[:max_tokens or None], tokenizer)}
    for what, texts in (('tokens/s, one text', 1), ('tokens/s, eight', 8)):
        seconds = timeit.repeat(lambda: list(model.generate(start, steps, num_samples=texts, compile='True')),
                                number=1, repeat=3)  # the first one warms up
        numbers[what] = texts * steps / min(seconds)
    return numbers


def megabytes(path):
    """Size of a model file, or of the .safetensors files in a folder."""
    files = [path] if os.path.isfile(path) else Path(path).glob('*.safetensors')
    return sum(map(os.path.getsize, files)) / 1e6


def write_hugging_face(folder, config, weights, dtype, facts):
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load.

    `facts` is what a model file says beside the weights. config.json keeps it under 'folio', so that load()
    can read it back. Raises OSError, and then leaves an older export as it was; see replacing_files().
    """
    from transformers import GPT2Config, GPT2LMHeadModel
    tokenizer = get_tokenizer(facts['tokenizer'])
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.n_embd, attn_pdrop=config.dropout, embd_pdrop=config.dropout,
        resid_pdrop=config.dropout, bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot,
        folio={**facts, 'config': dataclasses.asdict(config)})).to(getattr(torch, dtype))
    # Hugging Face's matrices are (inputs, outputs); where folio has no biases, Hugging Face's stay zero
    model.transformer.load_state_dict({name: w.t() if '.c_' in name and w.dim() == 2 else w
                                       for name, w in weights.items()}, strict=config.bias)
    patterns = 'model*.safetensors*', 'pytorch_model*.bin*', 'vocab.json', 'merges.txt'
    old = [path.name for pattern in patterns for path in Path(folder).glob(pattern)]
    with replacing_files(folder, ['config.json', *old]) as new:
        try:
            model.save_pretrained(new, max_shard_size='1TB')  # in one file
            # safetensors lets only the file's owner read it, whatever the umask
            os.chmod(f'{new}/model.safetensors', os.stat(f'{new}/config.json').st_mode)
            hugging_face_tokenizer(tokenizer, facts['trained_context']).save_pretrained(new)
        except Exception as error:  # tokenizers raises Exception itself where a disk is full
            raise OSError(f'{folder} could not be written: {error}') from None


if __name__ == '__main__':
    from config import configure, fail, given
    checkpoint = 'out'        # a model file, a folder of them (see README) or a Hub id
    dtype = 'int8'            # int8, int4, bfloat16 or float32
    format = 'folio'          # folio: a model file; hf: a folder for transformers, in float32 or bfloat16
    max_loss_increase = 0.05  # write nothing if the loss rises by more than this share; 0.05 = 5%
    dataset = ''              # measure the loss on data/<dataset>/; empty = what the model was trained on
    eval_tokens = 0           # tokens to measure the loss on, at least 2; 0 = all
    sidecars = False          # also write config.json (the shape) and meta.json (tokenizer, step, losses, …)
    configure(globals(), dict(dtype=('int8', 'int4', 'bfloat16', 'float32'), format=('folio', 'hf')))
    kind = 'float32' if format == 'hf' and 'dtype' not in given else dtype  # of the new weights
    if format == 'hf' and 'int' in kind:
        fail(f'--dtype={kind}: not for transformers; take float32 or bfloat16, or --format=folio', 2)
    if format == 'hf':
        import transformers  # noqa: F401  (if it is missing, this ends before the work)

    # -- the source ------------------------------------------------------------------------------------------
    keep_freed_memory()
    model, facts = load(checkpoint)
    path, config, tokenizer = facts['path'], model.config, get_tokenizer(facts['tokenizer'])
    print(path, file=sys.stderr)
    if sidecars and (format == 'hf' or os.path.isdir(path)):
        fail("--sidecars: its config.json would overwrite Hugging Face's; leave it out", 2)
    if config.quantized:
        fail(f'{path}: {config.quantized} already; name the model that it was made from')
    folder, stem = (path, 'model') if os.path.isdir(path) else os.path.split(os.path.splitext(path)[0])
    if not os.path.exists(checkpoint):  # from the Hub: write to out/, not into its cache
        folder = os.path.join('out', os.path.basename(checkpoint))
        os.makedirs(folder, exist_ok=True)
    target = os.path.join(folder, 'hf' if format == 'hf' else f"{stem.replace('ckpt', 'model')}_{kind}.pt")

    # -- the text to measure the loss on ---------------------------------------------------------------------
    train, val = load_data_of(facts, dataset)
    split, tokens = ('validation', val) if val is not None and len(val) > 1 else ('train', train)
    if tokens is None and dataset:
        fail(f"--dataset={dataset}: no whole data/{dataset} in the model's tokenizer; leave it out", 2)
    if tokens is None:
        print("no loss is measured: the model's data is not here; name it with --dataset", file=sys.stderr)

    # -- convert and measure ---------------------------------------------------------------------------------
    before = {'size, MB': megabytes(path) or model.num_params() * 4 / 1e6,
              **measure(model, 'the original', tokens, eval_tokens, tokenizer)}
    weights = {**model.state_dict(), 'wte.weight': model.wte.weight.detach()[:config.vocab_size]}
    del model  # so that each weight's memory is free once it is converted
    convert(weights, kind)
    config = dataclasses.replace(config, quantized=kind if 'int' in kind else '')
    shape = dataclasses.asdict(config)
    facts['made_by'] = ' '.join(['quantize.py', *sys.argv[1:], 'from', str(facts.get('made_by', path))])
    kept = ('tokenizer', 'trained_context', 'step', 'losses', 'dataset', 'made_by')
    facts = {key: facts[key] for key in kept if key in facts}
    model = build({**facts, 'config': shape, 'model': dict(weights)})
    after = measure(model, kind, tokens, eval_tokens, tokenizer)
    if tokens is not None and not after['loss'] <= before['loss'] * (1 + max_loss_increase):
        fail(f"{kind} raises the loss from {before['loss']:.4f} to {after['loss']:.4f}; nothing is written. "
             f'Take a finer --dtype (int8, bfloat16), or more than --max_loss_increase={max_loss_increase}')

    # -- write and report ------------------------------------------------------------------------------------
    if format == 'hf':
        write_hugging_face(target, config, weights, kind, facts)
    else:
        save(target, config, weights, **facts)
    if sidecars:
        for name, content in (('config.json', shape), ('meta.json', {**facts, 'dtype': kind})):
            with replacing(os.path.join(folder, name)) as f:
                f.write(json.dumps(content, indent=1).encode())
    after['size, MB'] = megabytes(target)
    print(f"{'':20s}{'original':>12s}{kind:>12s}")
    for what, number in before.items():
        decimals = 4 if what in ('loss', 'bits per byte') else 1
        print(f'{what:20s}{number:12,.{decimals}f}{after[what]:12,.{decimals}f}')
    if tokens is not None:
        change = after['loss'] / before['loss'] - 1
        print(f"the loss changes by {change:+.2%} (data/{dataset or facts['dataset']}, {split})")
    print(f'{path} -> {target}. Now: python sample.py --checkpoint={shlex.quote(target)}')
