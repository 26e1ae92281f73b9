"""Text to tokens: writes data/<dataset>/train.bin, val.bin and meta.json.

The .bin files hold raw little-endian uint16 token ids (nanoGPT's format); meta.json says which tokenizer made
them from which text. Memory use does not grow with the text.

$ python prepare.py    # input.txt in GPT-2's BPE: 301,966 + 36,059 tokens, 0.2 s
$ python prepare.py --tokenizer=char --dataset=shakespeare_char    # characters: 1,003,854 + 111,540 tokens
$ python prepare.py --input='books/*.txt' --dataset=books --val_fraction=0.01    # many files
$ python prepare.py --input=stories.txt --dataset=stories --special_tokens    # <|endoftext|> ends a document
"""
import base64
import codecs
import collections
import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

ENDOFTEXT = '<|endoftext|>'
VOCABULARY = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', 'gpt2.tiktoken')
# how GPT-2 splits text before it merges bytes: the pattern of https://github.com/openai/tiktoken
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# the characters that \s matches in this pattern; Python's isspace() accepts four control characters more
BLANKS = ''.join(c for c in map(chr, range(0x3001)) if c.isspace() and not '\x1c' <= c <= '\x1f')
# the position before the last blank of a run of more than 10,000 blanks
LONG_RUN_END = re.compile(rf'(?=[{BLANKS}][^{BLANKS}])(?<=[{BLANKS}]{{10000}})')


# -- tokenizers ----------------------------------------------------------------------------------------------

class GPT2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken; the vocabulary is data/gpt2.tiktoken, never the network's."""
    vocab_size, eot, start = 50257, 50256, 50256
    meta = {'name': 'gpt2', 'vocab_size': 50257}

    def __init__(self):
        lines = Path(VOCABULARY).read_bytes().splitlines()
        if len(lines) != 50256:
            raise ValueError(f'{VOCABULARY}: {len(lines):,} lines instead of 50,256; get the file again')
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        self.encoding = tiktoken.Encoding('gpt2', pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                          special_tokens={ENDOFTEXT: 50256}, explicit_n_vocab=50257)

    def encode(self, text, special_tokens=False):
        """Text -> list of ids. With special_tokens the text <|endoftext|> becomes the id eot.

        tiktoken panics on a run of about a million blanks inside a text, but not at its end. So long runs
        are cut before their last blank, where GPT2_PATTERN cuts them anyway.
        """
        if special_tokens:  # no document ends after the last <|endoftext|>
            return [id for part in text.split(ENDOFTEXT) for id in (*self.encode(part), self.eot)][:-1]
        if len(text) < 100_000:
            return self.encoding.encode_ordinary(text)
        return [id for part in LONG_RUN_END.split(text) for id in self.encoding.encode_ordinary(part)]

    def decode_bytes(self, ids):
        """Ids -> UTF-8 bytes, which may begin or end inside a character."""
        return self.encoding.decode_bytes(ids)


class CharTokenizer:
    """One id for each character, in code point order as in nanoGPT; there is no document end."""
    eot = None

    def __init__(self, characters):
        self.characters = ''.join(sorted(set(characters)))
        self.ids = {character: id for id, character in enumerate(self.characters)}
        self.vocab_size, self.start = len(self.ids), self.ids.get('\n', 0)
        if not 0 < self.vocab_size <= 65536:
            raise ValueError(f'{self.vocab_size:,} distinct characters; char takes 1 to 65,536, so use gpt2')
        self.meta = {'name': 'char', 'vocab_size': self.vocab_size, 'characters': self.characters}

    def encode(self, text, special_tokens=False):
        """Text -> list of ids. With special_tokens the text <|endoftext|> becomes a newline.

        Raises ValueError for a character that is not in the vocabulary.
        """
        text = text.replace(ENDOFTEXT, '\n') if special_tokens else text
        points, known = (np.frombuffer(characters.encode('utf-32-le', 'surrogatepass'), '<u4')
                         for characters in (text, self.characters))  # code points; `known` ascends
        ids = np.searchsorted(known, points).clip(max=len(known) - 1)
        for missing in np.flatnonzero(known[ids] != points)[:1]:
            raise ValueError(f'{text[missing]!r} is not in the char vocabulary {self.characters[:60]!r}')
        return ids.tolist()

    def decode_bytes(self, ids):
        """Ids -> UTF-8 bytes."""
        return ''.join(self.characters[i] for i in ids).encode('utf-8', 'surrogatepass')


def get_tokenizer(meta):
    """The tokenizer that `meta` describes: {'name': 'gpt2'} or {'name': 'char', 'characters': …}.

    Raises ValueError for another name.
    """
    if meta['name'] == 'gpt2':
        return GPT2Tokenizer()
    if meta['name'] == 'char':
        return CharTokenizer(meta['characters'])
    raise ValueError(f"tokenizer {meta['name']!r} is not one of gpt2, char")


def hugging_face_tokenizer(tokenizer, context):
    """The tokenizer as one of transformers, whose save_pretrained() writes what AutoTokenizer reads.

    A char vocabulary becomes a BPE without merges. `context` is the most tokens that the model can attend to.
    """
    import tokenizers
    import transformers
    from transformers.convert_slow_tokenizer import TikTokenConverter
    settings = dict(model_max_length=context, clean_up_tokenization_spaces=False)
    if tokenizer.eot is None:
        fast = tokenizers.Tokenizer(tokenizers.models.BPE(tokenizer.ids, []))
        fast.decoder = tokenizers.decoders.Fuse()
        return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **settings)
    vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(VOCABULARY)
    vocab[ENDOFTEXT] = tokenizer.eot
    return transformers.GPT2Tokenizer(vocab=vocab, merges=merges, **settings)


# -- ids to text ---------------------------------------------------------------------------------------------

class TextStream:
    """Turns ids into text one by one; `text` has whole characters only and ends before the string `stop`."""

    def __init__(self, tokenizer, stop=''):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')  # keeps the bytes of half a character
        self.text, self.ids = '', []
        self.held = ''   # decoded text that may be the beginning of `stop`, so it is not in `text` yet
        self.ended = ''  # why the text has ended: 'stop string' or 'end of text'

    def feed(self, id):
        """Add the next id; does nothing once the text has ended."""
        if self.ended:
            return
        self.ids.append(id)
        if id == self.tokenizer.eot:
            self.ended = 'end of text'
            return self.finish()
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([id]))
        if self.stop and self.stop in self.held:
            self.ended, self.held = 'stop string', self.held[:self.held.index(self.stop)]
            return self.finish()
        # the rest may be the beginning of `stop`, so it is held back
        sure = next(i for i in range(len(self.held) + 1) if self.stop.startswith(self.held[i:]))
        self.text, self.held = self.text + self.held[:sure], self.held[sure:]

    def finish(self):
        """Add the text held back, as no more ids come. The bytes of half a character are dropped."""
        self.text, self.held = self.text + self.held, ''


def stream_texts(steps, tokenizer, count, stop=''):
    """Decode the ids that generate() yields: after each step yield the list of `count` TextStreams.

    Stops as soon as all texts have ended, closes `steps`, and yields the finished list once more.
    """
    streams = [TextStream(tokenizer, stop) for _ in range(count)]
    with contextlib.closing(steps):
        for ids in steps:
            for stream, id in zip(streams, ids.tolist()):
                stream.feed(id)
            yield streams
            if all(stream.ended for stream in streams):
                break
    for stream in streams:
        stream.finish()
    yield streams


# -- text to ids ---------------------------------------------------------------------------------------------
# In this section a text is a sequence of blocks: strings, and None at the end of a document.

def find_files(input):
    """The files that `input` names, sorted: one file, all files in a folder but hidden ones, or a glob's.

    Raises FileNotFoundError if there are none.
    """
    pattern = os.path.join(glob.escape(input), '**') if os.path.isdir(input) else input
    found = [input] if os.path.isfile(input) else glob.glob(pattern, recursive=True)
    files = sorted(filter(os.path.isfile, found))
    if not files:
        raise FileNotFoundError(f'{input or "(empty)"}: no such file, folder or glob; name another input')
    return files


def read_text(path, digest=None):
    """Yield the text of a UTF-8 file in blocks, newlines unchanged; path 0 is standard input.

    Adds the file's bytes to the hash `digest`. Raises ValueError with the position of a byte that is not
    UTF-8.
    """
    decoder, done = codecs.getincrementaldecoder('utf-8')(), 0
    with open(path, 'rb') as f:
        try:
            while block := f.read(2**16):
                done += len(block)
                if digest:
                    digest.update(block)
                yield decoder.decode(block)
            decoder.decode(b'', final=True)
        except UnicodeDecodeError as error:
            at = done - len(error.object) + error.start  # error.object: what was being decoded
            name = path or 'standard input'
            raise ValueError(f'{name}: not UTF-8 at byte {at:,}; convert it, for example by iconv') from None


def read_documents(files, joiner, digest=None):
    """Yield the blocks of all files; between two files yield `joiner`, a string or None."""
    for path in files:
        if path != files[0]:
            yield joiner
        yield from read_text(path, digest)


def split_at(cut, blocks):
    """Yield ('train', block) for the first `cut` characters of the blocks, ('val', block) for the rest."""
    position = 0
    for block in blocks:
        if block is None and position:  # no document ends before the first character
            yield 'train' if position <= cut else 'val', None
        elif block:
            if position < cut:
                yield 'train', block[:cut - position]
            if position + len(block) > cut:
                yield 'val', block[max(cut - position, 0):]
            position += len(block)


def cut_exactly(blocks):
    """Regroup blocks into pieces that can be encoded one by one: their ids, joined, are the whole text's.

    A piece ends where a word does, because GPT2_PATTERN always cuts between a word and a blank. Text after
    the last word of a block waits for the next block.
    """
    held = ''
    for block in blocks:
        if block is None:
            yield from (held, None)
            held = ''
        else:
            text = held + block
            last_blank = max(text.rfind(' '), text.rfind('\n'))
            word_end = len(text[:last_blank + 1].rstrip(BLANKS))
            yield text[:word_end]
            held = text[word_end:]
    yield held


def computed_ahead(pool, f, items, ahead):
    """Yield f(item) for each item in order; a pool computes them, at most `ahead` in advance."""
    jobs = collections.deque()
    for item in items:
        jobs.append(pool.submit(f, item))
        if len(jobs) > ahead:
            yield jobs.popleft().result()
    for job in jobs:
        yield job.result()


def write_tokens(path, tokenizer, blocks, special_tokens):
    """Encode blocks on all cores into a file of uint16; yield how many characters and ids were written."""
    def encode(piece):
        ids = [tokenizer.eot] if piece is None else tokenizer.encode(piece, special_tokens)
        return len(piece or ''), np.array(ids, dtype='<u2')

    cores = os.cpu_count() or 1
    with open(path, 'wb') as f, ThreadPoolExecutor(cores) as pool:  # threads: tiktoken releases the GIL
        for characters, ids in computed_ahead(pool, encode, cut_exactly(blocks), 4 * cores):
            f.write(ids.tobytes())
            yield characters, len(ids)
        f.flush()
        os.fsync(f.fileno())


def check_dataset(dataset):
    """Raise ValueError if `dataset` does not name a folder below data/."""
    if not dataset or os.path.isabs(dataset) or '..' in dataset.replace('\\', '/').split('/'):
        raise ValueError("give the name of a folder below data/, such as 'shakespeare'")


def prepare(input='input.txt', dataset='shakespeare', tokenizer='gpt2', val_fraction=0.1,
            special_tokens=False, characters=''):
    """Turn text into the files of data/<dataset>/; return the contents of meta.json.

    The last `val_fraction` of the characters is cut off before tokenizing. Between two files stands the
    document end, or a newline for char. A char vocabulary holds `characters`, or by default the text's own.
    Raises ValueError or OSError for a text it cannot use, and then leaves the old files as they were.
    """
    began, total, found, digest = time.time(), 0, set(), hashlib.sha256()
    files, joiner = find_files(input), '\n' if tokenizer == 'char' else None
    for block in read_documents(files, joiner, digest):  # a first reading, because the cut needs the length
        total += len(block or '')
        if tokenizer == 'char':
            found.update(block)
    cut = int(total * (1 - val_fraction))
    if not cut:
        raise ValueError(f'{input}: {total} characters, val_fraction {val_fraction}: none left to train on')
    tok = get_tokenizer({'name': tokenizer, 'characters': characters or found})
    tok.encode(''.join(sorted(found)))  # raises ValueError for one that is not in `characters`

    folder, tokens, done, shown = os.path.join('data', dataset), {}, 0, began
    os.makedirs(folder, exist_ok=True)
    pairs = split_at(cut, read_documents(files, joiner))  # all of train, then all of val
    for split, pairs_of_split in itertools.groupby(pairs, key=lambda pair: pair[0]):
        tokens[split], blocks = 0, (block for _, block in pairs_of_split)
        for read, written in write_tokens(f'{folder}/{split}.bin.tmp', tok, blocks, special_tokens):
            done, tokens[split] = done + read, tokens[split] + written
            if time.time() - shown > 2:
                shown = time.time()
                print(f'{done / total:.0%} of {total:,} characters, {done / (shown - began) / 1e6:.1f} M/s, '
                      f'{(shown - began) * (total / max(done, 1) - 1):.0f} s left', file=sys.stderr)
        print(f'{folder}/{split}.bin: {tokens[split]:,} tokens')
    source = {'input': input, 'files': len(files), 'characters': total, 'sha256': digest.hexdigest(),
              'bytes': sum(map(os.path.getsize, files))}
    meta = {'format_version': 1, 'tokenizer': tok.meta, 'tokens': tokens, 'source': source,
            'val_fraction': val_fraction, 'special_tokens': special_tokens}
    replace_data(folder, meta)
    seconds = time.time() - began
    print(f'{folder}/meta.json: {tokenizer}, vocabulary {tok.vocab_size:,}, from {total:,} characters of '
          f'{input} in {seconds:.1f} s ({total / seconds / 1e6:.1f} M/s)')
    return meta


def replace_data(folder, meta):
    """Write meta.json and give the .tmp files of a folder their final names.

    The old meta.json is deleted first and the new one named last, so a folder with a meta.json is complete.
    """
    with open(f'{folder}/meta.json.tmp', 'w', encoding='utf-8') as f:
        json.dump(meta, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    for name in ('meta.json', 'train.bin', 'val.bin'):
        Path(folder, name).unlink(missing_ok=True)
    for split in reversed(meta['tokens']):  # val.bin first: train.py takes data with a train.bin for complete
        os.replace(f'{folder}/{split}.bin.tmp', f'{folder}/{split}.bin')
    os.replace(f'{folder}/meta.json.tmp', f'{folder}/meta.json')


def load_data(dataset):
    """The contents of data/<dataset>/: (train, val or None, meta); ids are uint16 memory maps, copy-on-write.

    .bin files without a meta.json are nanoGPT's, in GPT-2's vocabulary. Raises ValueError for files that do
    not fit meta.json, and for nanoGPT's char data: its meta.pkl, a pickle, could run any code.
    """
    folder, splits = os.path.join('data', dataset), []
    meta = {'tokenizer': GPT2Tokenizer.meta}
    if os.path.exists(f'{folder}/meta.json'):
        try:
            meta = json.loads(Path(folder, 'meta.json').read_text('utf-8'))
            get_tokenizer(meta['tokenizer'])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{folder}/meta.json: damaged; prepare it again with prepare.py') from None
    elif os.path.exists(f'{folder}/meta.pkl'):
        raise ValueError(f'{folder}: its characters are in a meta.pkl, which is not read; prepare it again')
    for split in ('train', 'val'):
        path = f'{folder}/{split}.bin'
        size = os.path.getsize(path) if split == 'train' or os.path.exists(path) else 0
        want = 2 * meta['tokens'].get(split, 0) if 'tokens' in meta else size // 2 * 2
        if size != want or split == 'train' and not size:
            raise ValueError(f'{path}: {size:,} bytes instead of {want:,}; prepare it again with prepare.py')
        splits.append(np.memmap(path, dtype='<u2', mode='c') if size else None)
        if 'tokens' not in meta and size and splits[-1].max() >= 50257:
            raise ValueError(f"{path}: no meta.json, and ids above GPT-2's largest, 50,256; prepare it again")
    return *splits, meta


def load_data_of(meta, dataset=''):
    """load_data()'s (train, val) that a model was trained on, or those of `dataset`; `meta` is the model's.

    (None, None) if they are not here whole, or in another tokenizer, or fewer than four ids.
    """
    try:
        dataset = dataset or meta['dataset']
        check_dataset(dataset)
        train, val, data_meta = load_data(dataset)
        same = data_meta['tokenizer'] == meta['tokenizer'] and len(train) > 3
        return (train, val) if same else (None, None)
    except (ValueError, OSError, AttributeError, KeyError, TypeError):  # damaged, or not here
        return None, None


def check_data(dataset, meta, wanted):
    """Raise ValueError if the data of this meta differ from what is wanted.

    Of the dict `wanted`, only tokenizer, val_fraction and input count. An input is compared by its contents.
    """
    has = {**meta, 'tokenizer': meta['tokenizer']['name'], 'input': meta.get('source', {}).get('input')}
    for key, value in wanted.items():
        same = has.get(key) in (value, None)  # None: nanoGPT's data, which do not say
        if key == 'input' and has['input']:
            digest = hashlib.sha256()
            for _ in read_documents(find_files(value), None, digest):
                pass
            same = digest.hexdigest() == meta['source']['sha256']
        if not same:
            raise ValueError(f'data/{dataset}: {key} {has[key]} differs from {value}; name another dataset')


if __name__ == '__main__':
    from config import configure, fail
    input = 'input.txt'      # UTF-8 text: a file, a folder (all of it) or a glob
    dataset = 'shakespeare'  # the tokens go to data/<dataset>/
    tokenizer = 'gpt2'       # gpt2 (50,257 byte pairs) or char (one id a character)
    val_fraction = 0.1       # share of the characters, at the end, kept for validation; 0 = none
    special_tokens = False   # the text <|endoftext|> is the document end, not plain characters
    configure(globals(), dict(dataset=check_dataset, tokenizer=('gpt2', 'char'), val_fraction=(0, 0.999999)))
    if special_tokens and tokenizer == 'char':
        fail('--special_tokens: a char vocabulary has no document end; leave it out, or take gpt2', 2)
    prepare(input, dataset, tokenizer, val_fraction, special_tokens)
