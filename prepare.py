"""Text to tokens: writes data/<dataset>/train.bin, val.bin and meta.json.

The .bin files hold raw little-endian uint16 token ids (nanoGPT's format); meta.json says which tokenizer made
them from which text. Memory use does not grow with the text.

$ python prepare.py    # input.txt in GPT-2's BPE: 301,966 + 36,059 tokens, 0.2 s
$ python prepare.py --tokenizer=char --dataset=shakespeare_char    # characters: 1,003,854 + 111,540 tokens
$ python prepare.py --tokenizer=bpe --vocab_size=2048 --dataset=shakespeare_bpe    # its own byte pairs
$ python prepare.py --input='books/*.txt' --dataset=books --val_fraction=0.01    # many files
$ python prepare.py --input=stories.txt --dataset=stories --special_tokens    # <|endoftext|> ends a document
"""
import base64
import codecs
import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import weakref
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

ENDOFTEXT = '<|endoftext|>'
VOCABULARY = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', 'gpt2.tiktoken')
GPT2 = {'name': 'gpt2', 'vocab_size': 50257}  # the meta of GPT-2's tokenizer
# how GPT-2 splits text before it merges bytes: the pattern of https://github.com/openai/tiktoken
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# the characters that \s matches in this pattern; Python's isspace() is also true of four control characters
BLANKS = ''.join(c for c in map(chr, range(0x3001)) if c.isspace() and not '\x1c' <= c <= '\x1f')
# the position before the last blank of a run of more than 10,000 blanks
LONG_RUN_END = re.compile(rf'(?=[{BLANKS}][^{BLANKS}])(?<=[{BLANKS}]{{10000}})')


# -- tokenizers ----------------------------------------------------------------------------------------------

class BPETokenizer:
    """Byte-pair encoding by tiktoken: GPT-2's, or one learnt from a text by learn_tokenizer().

    `tokens` are in base64, in the order of their ids; the document end gets the next id. Raises ValueError if
    there are more or fewer than `meta` says, or if one of the 256 bytes is missing.
    """
    def __init__(self, tokens, meta):
        self.meta, self.vocab_size = meta, len(tokens) + 1
        self.eot = self.start = len(tokens)
        ranks = {base64.b64decode(token): id for id, token in enumerate(tokens)}
        if len(ranks) != meta['vocab_size'] - 1 or not ranks.keys() >= {bytes([i]) for i in range(256)}:
            raise ValueError(f"the {meta['name']} vocabulary is damaged (gpt2's is {VOCABULARY})")
        self.encoding = tiktoken.Encoding(meta['name'], pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                          special_tokens={ENDOFTEXT: self.eot})
        self.decode_bytes = self.encoding.decode_bytes  # ids -> UTF-8, which may end inside a character

    def encode(self, text, special_tokens=False):
        """Text -> list of ids. With special_tokens the text <|endoftext|> becomes the id eot.

        tiktoken panics on a run of about a million blanks inside a text, but not at its end. So long runs
        are cut before their last blank, where GPT2_PATTERN cuts them anyway.
        """
        if special_tokens:  # the last part has no <|endoftext|> after it
            return [id for part in text.split(ENDOFTEXT) for id in (*self.encode(part), self.eot)][:-1]
        parts = LONG_RUN_END.split(text) if len(text) > 100_000 else [text]
        return [id for part in parts for id in self.encoding.encode_ordinary(part)]


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
        try:
            return [self.ids[character] for character in text]
        except KeyError as missing:
            raise ValueError(f'{missing} is not in the char vocabulary {self.characters[:60]!r}') from None

    def decode_bytes(self, ids):
        """Ids -> UTF-8 bytes."""
        return ''.join(self.characters[i] for i in ids).encode('utf-8', 'surrogatepass')


def get_tokenizer(meta):
    """The tokenizer that `meta` describes, a tokenizer's own `meta`. Raises ValueError for another name."""
    if meta['name'] == 'gpt2':  # never from the network; a line is a token and its id
        return BPETokenizer(Path(VOCABULARY).read_bytes().split()[::2], GPT2)
    if meta['name'] == 'bpe':
        return BPETokenizer(meta['tokens'].split(), meta)
    if meta['name'] == 'char':
        return CharTokenizer(meta['characters'])
    raise ValueError(f"tokenizer {meta['name']!r} is not one of gpt2, bpe, char")


def learn_tokenizer(pieces, share, vocab_size):
    """The meta of a bpe tokenizer learnt from a `share` of the pieces of a text, evenly spread.

    Its tokens are the 256 bytes and the merges of the most frequent pairs, fewer than asked for if the text
    has no more pairs. Raises ImportError if rustbpe is not installed; all else works without it.
    """
    import rustbpe
    learner = rustbpe.Tokenizer()
    texts = (piece.replace(ENDOFTEXT, '') for piece in pieces if piece)
    chosen = (text for number, text in enumerate(texts) if number * share % 1 < share)
    learner.train_from_iterator(chosen, vocab_size - 1, buffer_size=64, pattern=GPT2_PATTERN)
    tokens = [base64.b64encode(bytes(token)).decode() for token, id in learner.get_mergeable_ranks()]
    return {'name': 'bpe', 'vocab_size': len(tokens) + 1, 'tokens': ' '.join(tokens)}


def byte_lengths(tokenizer):
    """The bytes of each id's text, (vocab_size,); 0 for the document end, which is not text."""
    return np.array([len(tokenizer.decode_bytes([id])) * (id != tokenizer.eot)
                     for id in range(tokenizer.vocab_size)])


def bits_per_nat(tokens, tokenizer, size=0):
    """The factor that turns a mean loss over these ids, in nats per id, into bits per byte of their text.

    `size` is the text's length in bytes; without it the bytes are counted.
    """
    lengths, parts = byte_lengths(tokenizer), np.array_split(tokens, len(tokens) // 2**24 + 1)
    return len(tokens) / (size or sum(int(lengths[part].sum()) for part in parts) or 1) / math.log(2)


def hugging_face_tokenizer(tokenizer, context):
    """The tokenizer as one of transformers, whose save_pretrained() writes a folder for AutoTokenizer.

    A char vocabulary becomes a BPE without merges. `context` is the most tokens that the model can attend to.
    """
    import tokenizers
    import transformers
    # transformers.convert_slow_tokenizer is sometimes a function, so this imports from the module
    from transformers.convert_slow_tokenizer import TikTokenConverter
    settings = dict(model_max_length=context, clean_up_tokenization_spaces=False)
    if tokenizer.eot is None:
        fast = tokenizers.Tokenizer(tokenizers.models.BPE(tokenizer.ids, []))
        fast.decoder = tokenizers.decoders.Fuse()
        return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **settings)
    converter = TikTokenConverter()
    converter.load_tiktoken_bpe = lambda path: tokenizer.encoding._mergeable_ranks  # no file is read
    vocab, merges = converter.extract_vocab_merges_from_model('')
    vocab[ENDOFTEXT] = tokenizer.eot
    return transformers.GPT2Tokenizer(vocab=vocab, merges=merges, **settings)


# -- ids to text ---------------------------------------------------------------------------------------------

class TextStream:
    """Turns ids into text one by one; `text` has only whole characters and ends before the string `stop`."""

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
            return
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([id]))
        if self.stop and self.stop in self.held:
            self.ended, self.held = 'stop string', self.held[:self.held.index(self.stop)]
        # the rest may be the beginning of `stop`, so it is held back
        sure = next(i for i in range(len(self.held) + 1) if self.stop.startswith(self.held[i:]))
        self.text, self.held = self.text + self.held[:sure], self.held[sure:]


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
        stream.text += stream.held  # no more ids come; the bytes of half a character are dropped
    yield streams


# -- text to ids ---------------------------------------------------------------------------------------------
# In this section a text is a sequence of pieces that can be encoded one by one, with None between documents.

def find_files(input):
    """The files that `input` names, sorted: one file, a folder's (except hidden ones), or those of a glob.

    Raises FileNotFoundError if there are none.
    """
    pattern = os.path.join(glob.escape(input), '**') if os.path.isdir(input) else input
    found = [input] if os.path.isfile(input) else glob.glob(pattern, recursive=True)
    if not (files := sorted(filter(os.path.isfile, found))):
        raise FileNotFoundError(f'{input or "no input"}: no files there; name a file, a folder or a glob')
    return files


def read_bytes(path, digest=None, lines=False):
    """Yield the bytes of a file in blocks or in lines, unpacked if it is a .gz; path 0 is standard input.

    Adds them to the hash `digest`. Raises ValueError for a damaged .gz.
    """
    try:
        with (gzip.open if str(path).endswith('.gz') else open)(path, 'rb') as f:
            for block in f if lines else iter(lambda: f.read(2**16), b''):
                if digest:
                    digest.update(block)
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f'{path}: damaged: {error}; get the file again') from None


def read_text(path, digest=None):
    """Yield the text of a UTF-8 file in blocks, newlines unchanged; see read_bytes().

    Raises ValueError with the position of a byte that is not UTF-8.
    """
    name, done = path or 'standard input', 0
    try:
        for text in codecs.iterdecode(read_bytes(path, digest), 'utf-8'):
            yield text
            done += len(text.encode())
    except UnicodeDecodeError as error:  # of the bytes after the first `done`
        raise ValueError(f'{name}: not UTF-8 at byte {done + error.start:,}; convert or remove it') from None


def read_json_lines(path, digest=None):
    """For each line of a .jsonl file yield [its `text`]. Raises ValueError for a line that has none."""
    for number, line in enumerate(read_bytes(path, digest, lines=True), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)['text']
            text.encode()  # raises ValueError for half of a surrogate pair
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f'{path}, line {number:,}: not {{"text": "…"}} in JSON; correct it') from None
        yield [text]


def read_documents(files, tokenizer, digest=None):
    """Yield the pieces of all documents, and between two documents None, or a newline for tokenizer 'char'.

    A document is a file, or a line's `text` in a .jsonl or .jsonl.gz file.
    """
    documents = (read_json_lines(path, digest) if path.lower().endswith(('.jsonl', '.jsonl.gz'))
                 else [cut_exactly(read_text(path, digest))] for path in files)
    for number, document in enumerate(itertools.chain.from_iterable(documents)):
        if number:
            yield '\n' if tokenizer == 'char' else None
        yield from document


def cut_exactly(blocks):
    """Regroup a document's blocks into pieces whose ids, joined, are those of the whole document.

    A piece ends where a word does, because GPT2_PATTERN always cuts between a word and a blank. Text after
    the last word of a block waits for the next block.
    """
    held = []  # text after the last piece; one string would be copied for each block without a blank
    for block in blocks:
        if piece := block[:max(block.rfind(' '), block.rfind('\n')) + 1].rstrip(BLANKS):
            yield ''.join([*held, piece])
            held.clear()
        held.append(block[len(piece):])
    yield ''.join(held)


def split_at(cut, pieces):
    """Yield ('train', piece) for the first `cut` characters of the pieces, ('val', piece) for the rest.

    A piece is cut in two here, if need be. Each split's ids are still those of its whole text.
    """
    position = 0
    for piece in pieces:
        if piece is None and position:  # no document ends before the first character
            yield 'train' if position <= cut else 'val', None
        elif piece:
            if position < cut:
                yield 'train', piece[:cut - position]
            if position + len(piece) > cut:
                yield 'val', piece[max(cut - position, 0):]
            position += len(piece)


def write_splits(folder, tokenizer, pairs, special_tokens, total):
    """Encode (split, piece) pairs, all of train first, into the splits' files; `total` is their text's bytes.

    Prints the progress. Returns what meta.json says about the splits: {'tokens': {split: its number of ids},
    'bytes': {split: the bytes of its text}, 'sha256': {split: the file's}}.
    """
    def encode(piece):
        if tokenizer.eot and piece and not special_tokens and len(piece) < 100_000:  # faster than by a list
            ids = tokenizer.encoding.encode_to_numpy(piece, disallowed_special=())
        else:
            ids = [tokenizer.eot] if piece is None else tokenizer.encode(piece, special_tokens)
        return np.array(ids, dtype='<u2')

    cores, lengths, tokens, size = os.cpu_count() or 1, byte_lengths(tokenizer), Counter(), Counter()
    digests = defaultdict(hashlib.sha256)
    began = shown = time.time()
    for split, pairs_of_split in itertools.groupby(pairs, key=lambda pair: pair[0]):
        # threads, because tiktoken releases the GIL; only a few pieces ahead, or they would fill the memory
        with open(f'{folder}/{split}.bin', 'wb') as f, ThreadPoolExecutor(cores) as pool:
            jobs = (pool.submit(encode, piece) for _, piece in pairs_of_split)
            ahead = deque(itertools.islice(jobs, 4 * cores))
            while ahead:
                ids = ahead.popleft().result()
                ahead.extend(itertools.islice(jobs, 1))
                f.write(ids.tobytes())
                digests[split].update(ids)
                tokens[split] += len(ids)
                size[split] += int(lengths[ids].sum())
                if time.time() - shown > 2:
                    shown, done = time.time(), sum(size.values()) or 1
                    left = (shown - began) * (total / done - 1)
                    print(f'{done / total:.0%} of {total / 1e6:,.1f} MB, {left:.0f} s left', file=sys.stderr)
    return {'tokens': tokens, 'bytes': size, 'sha256': {split: d.hexdigest() for split, d in digests.items()}}


class FolderLock:
    """Keeps other processes from writing to a folder while this object lives; makes the folder, but no file.

    Raises ValueError if another process holds the lock.
    """
    descriptor = None

    def __init__(self, folder):
        os.makedirs(folder, exist_ok=True)
        with contextlib.suppress(ImportError, OSError):  # Windows and some network file systems have no locks
            import fcntl
            self.descriptor = os.open(folder, os.O_RDONLY)
            weakref.finalize(self, os.close, self.descriptor)  # which also ends the lock
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f'{folder}: another process uses it; wait, or take another') from None


@contextlib.contextmanager
def replacing_files(folder, old):
    """The path of a new folder, whose files take the place of the files named `old` when the block ends.

    old[0] is removed first and put in place last, so a folder that has it is complete. If anything fails, the
    old files are put back; if that fails too, or after a kill, the next call does it. Raises OSError, or
    ValueError if another process writes there.
    """
    lock, new, moved = FolderLock(folder), os.path.join(folder, '.new'), []
    if not os.path.exists(f'{folder}/{old[0]}'):  # a process was killed between the renames
        for path in glob.glob(f'{glob.escape(new)}/*.old'):
            os.replace(path, os.path.join(folder, os.path.basename(path)[:-4]))
    shutil.rmtree(new, ignore_errors=True)
    try:
        os.makedirs(new)
        yield new
        names = sorted(os.listdir(new), key=old[0].__eq__)
        for name in names:
            with open(f'{new}/{name}', 'rb+') as f:
                os.fsync(f.fileno())
        here = [name for name in dict.fromkeys([*old, *names]) if os.path.exists(f'{folder}/{name}')]
        away = [(f'{folder}/{name}', f'{new}/{name}.old') for name in here]
        for move in away + [(f'{new}/{name}', f'{folder}/{name}') for name in names]:
            moved.append(move)  # before the move, because a signal may come between
            os.replace(*move)
        if lock.descriptor is not None:  # the renames reach the disk with the folder
            os.fsync(lock.descriptor)
    except BaseException as error:
        for before, after in reversed(moved):
            if os.path.exists(after):
                os.replace(after, before)
        shutil.rmtree(new, ignore_errors=True)
        if getattr(error, 'errno', None) and not error.filename:  # a failed write, which names no file
            raise OSError(error.errno, error.strerror, folder) from None
        raise
    shutil.rmtree(new, ignore_errors=True)


def check_dataset(dataset):
    """Raise ValueError if `dataset` does not name a folder below data/."""
    if dataset in ('', '.') or os.path.isabs(dataset) or '..' in dataset.replace('\\', '/').split('/'):
        raise ValueError("give the name of a folder below data/, such as 'shakespeare'")


def check_vocab_size(size):
    """Raise ValueError if a bpe vocabulary cannot have this many ids."""
    if size and not 257 <= size <= 65536:
        raise ValueError('must be 257 (256 bytes and the document end) to 65,536, or 0')


# limits of prepare()'s arguments, as configure() takes them
LIMITS = dict(dataset=check_dataset, tokenizer=('gpt2', 'bpe', 'char'), vocab_size=check_vocab_size,
              val_fraction=(0, 0.999999))


def prepare(input='input.txt', dataset='shakespeare', tokenizer='gpt2', val_fraction=0.1,
            special_tokens=False, vocab_size=0, known=None, keep=False):
    """Turn text into the files of data/<dataset>/; return the contents of meta.json.

    The last `val_fraction` of the characters is cut off before tokenizing. The document end stands between
    two documents, or a newline for char; with special_tokens the text <|endoftext|> becomes one too. `known`
    is the meta of a tokenizer to use; without it, char takes the text's characters, and bpe learns a
    vocabulary of `vocab_size` ids from the training split (0: 1,024 for texts under 400 kB, 4,096 from 1.6 MB
    on, else 2,048).
    Raises ValueError or OSError for a text it cannot use, and then leaves the old files as they were. With
    `keep` it also raises ValueError if there are data already.
    """
    if vocab_size and tokenizer != 'bpe':
        raise ValueError(f'vocab_size {vocab_size}: {tokenizer} has its own; leave it out, or take bpe')
    began, files, digest, folder = time.time(), find_files(input), hashlib.sha256(), f'data/{dataset}'
    with replacing_files(folder, ('train.bin', 'meta.json', 'val.bin')) as new:
        if keep and any(os.path.exists(f'{folder}/{name}') for name in ('train.bin', 'meta.json')):
            raise ValueError(f'{folder}: has data, or a part of it; start again, or prepare it again')
        total, size, found = 0, 0, set()
        for piece in filter(None, read_documents(files, tokenizer, digest)):  # read once for the length
            total, size = total + len(piece), size + len(piece.encode())
            if tokenizer == 'char':
                found.update(piece, '\n' * special_tokens)
        cut = int(total * (1 - val_fraction))
        if cut < 1:
            raise ValueError(f'{input}: {total} characters, val_fraction {val_fraction}: nothing to train on')
        if tokenizer == 'bpe' and not known:
            share = min(200e6 / size, 1)  # of the text's bytes, 200 MB at most
            ids = vocab_size or (1024 if size < 400_000 else 2048 if size < 1_600_000 else 4096)
            print(f'learning {ids:,} ids from {size * share / 1e6:,.1f} MB of text', file=sys.stderr)
            pairs = split_at(cut, read_documents(files, tokenizer))
            known = learn_tokenizer((piece for split, piece in pairs if split == 'train'), share, ids)
        tok = get_tokenizer(known or {'name': tokenizer, 'characters': found})
        tok.encode(''.join(sorted(found)))  # raises ValueError for one that `known` lacks
        splits = write_splits(new, tok, split_at(cut, read_documents(files, tokenizer)), special_tokens, size)
        source = {'input': input, 'files': len(files), 'characters': total, 'sha256': digest.hexdigest(),
                  'bytes': sum(map(os.path.getsize, files))}
        meta = {'format_version': 1, 'tokenizer': tok.meta, 'source': source, 'val_fraction': val_fraction,
                'special_tokens': special_tokens,
                'vocab_size': vocab_size if tokenizer == 'bpe' else tok.vocab_size, **splits}
        Path(new, 'meta.json').write_text(json.dumps({**meta, 'checksum': checksum(meta)}, indent=1), 'utf-8')
    for split, count in splits['tokens'].items():
        print(f'{folder}/{split}.bin: {count:,} tokens')
    seconds = time.time() - began
    print(f'{folder}/meta.json: {tokenizer}, vocabulary {tok.vocab_size:,}, from {total:,} characters of '
          f'{input} in {seconds:.1f} s ({total / seconds / 1e6:.1f} M/s)')
    return meta


def checksum(meta):
    """The SHA-256 of meta.json's contents."""
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def load_data(dataset):
    """The contents of data/<dataset>/: (train, val or None, meta); ids are uint16 memory maps.

    .bin files without a meta.json are nanoGPT's, in GPT-2's vocabulary. Raises ValueError for files that do
    not fit meta.json, and for nanoGPT's char data: its meta.pkl, a pickle, could run any code.
    """
    folder, splits = os.path.join('data', dataset), []
    meta, counts = {'tokenizer': GPT2}, {}
    if os.path.exists(f'{folder}/meta.json'):
        try:
            meta = json.loads(Path(folder, 'meta.json').read_text('utf-8'))
            # an older meta.json has neither checksum nor sha256
            same = meta.pop('checksum', '') == (checksum(meta) if 'sha256' in meta else '')
            if not same or get_tokenizer(meta['tokenizer']).vocab_size != meta['tokenizer']['vocab_size']:
                raise ValueError('its checksum does not match, or its vocabulary has another size')
            counts = {split: int(count) for split, count in meta.get('tokens', {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f'{folder}/meta.json: damaged ({error}); prepare it again') from None
    elif os.path.exists(f'{folder}/meta.pkl'):
        raise ValueError(f'{folder}: its characters are in a meta.pkl, which is not read; prepare it again')
    for split in ('train', 'val'):
        path = f'{folder}/{split}.bin'
        size = os.path.getsize(path) if os.path.exists(path) else 0
        # a val.bin that meta.json does not name is left over from a preparation that was killed; where there
        # are no counts, any even size is right
        want = 2 * counts.get(split, 0 if counts else size // 2)
        if want and size != want or split == 'train' and not want:
            raise ValueError(f'{path}: {size:,} bytes instead of {want:,}, or missing; prepare it again')
        splits.append(np.memmap(path, dtype='<u2', mode='r') if want else None)
        known = meta.get('sha256', {}).get(split)  # hashing over 1 GB would take seconds
        if known and size <= 2**30 and hashlib.sha256(splits[-1]).hexdigest() != known:
            raise ValueError(f'{path}: damaged: not the ids that prepare.py wrote; prepare it again')
        if not known and want and splits[-1].max() >= meta['tokenizer']['vocab_size']:
            raise ValueError(f'{path}: has ids that are not in its vocabulary; prepare it again')
    return *splits, meta


def load_data_of(meta, dataset=''):
    """load_data()'s (train, val) that a model was trained on, or those of `dataset`; `meta` is the model's.

    (None, None) if they are absent or damaged, use another tokenizer, or train has fewer than four ids.
    """
    with contextlib.suppress(ValueError, OSError, AttributeError, KeyError, TypeError):  # damaged or absent
        dataset = dataset or meta['dataset']
        check_dataset(dataset)
        train, val, data_meta = load_data(dataset)
        if data_meta['tokenizer'] == meta['tokenizer'] and len(train) > 3:
            return train, val
    return None, None


def check_data(dataset, meta, wanted):
    """Raise ValueError if the data of this meta differ from what is wanted.

    Of the dict `wanted`, only tokenizer, vocab_size, val_fraction and input count; input by its contents.
    """
    has = {**meta, 'vocab_size': meta['tokenizer']['vocab_size'], 'tokenizer': meta['tokenizer']['name'],
           'input': meta.get('source', {}).get('input')}
    for key, value in wanted.items():
        # nanoGPT's data has no such keys; meta['vocab_size'] is what was asked for: 0, or more than was found
        same = has.get(key) is None or value in (has[key], meta.get(key))
        if key == 'input' and has['input']:
            digest = hashlib.sha256()
            deque(read_documents(find_files(value), has['tokenizer'], digest), maxlen=0)  # reads all of it
            same = digest.hexdigest() == meta['source']['sha256']
        if not same:
            how = 'has changed' if has[key] == value else f'differs from {value}'
            raise ValueError(f'data/{dataset}: {key} {has[key]} {how}; prepare it again or name another')


if __name__ == '__main__':
    from config import configure
    input = 'input.txt'      # UTF-8 text, .jsonl, or .gz of either: a file, a folder (all of it) or a glob
    dataset = 'shakespeare'  # the tokens go to data/<dataset>/
    tokenizer = 'gpt2'       # gpt2 (50,257 byte pairs), bpe (learnt from the text) or char (characters)
    vocab_size = 0           # ids of a bpe vocabulary, from 257 on; 0 = 1,024 to 4,096 by the text's size
    val_fraction = 0.1       # share of the characters, at the end, kept for validation; 0 = none
    special_tokens = False   # the text <|endoftext|> is the document end (char: a newline), not plain text
    configure(globals(), LIMITS)
    prepare(input, dataset, tokenizer, val_fraction, special_tokens, vocab_size)
