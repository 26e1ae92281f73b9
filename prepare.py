"""
Text to tokens: data/<dataset>/train.bin and val.bin (raw little-endian uint16 ids, nanoGPT's format) and meta.json,
which says what they are. Memory does not grow with the text.

$ python prepare.py                                                # input.txt with GPT-2's BPE: 301,966 + 36,059 tokens, 0.2 s
$ python prepare.py --tokenizer=char --dataset=shakespeare_char    # one id a character: 1,003,854 + 111,540 tokens
$ python prepare.py --input='books/*.txt' --dataset=books --val_fraction=0.01
$ python prepare.py --input=TinyStories.txt --dataset=stories --special_tokens   # <|endoftext|> ends a document
"""
import base64
import codecs
import collections
import concurrent.futures
import glob
import hashlib
import json
import os
import pickle
import re
import sys
import time

import numpy as np
import tiktoken

FORMAT_VERSION = 1
ENDOFTEXT = '<|endoftext|>'
# the split pattern of tiktoken's own gpt2 encoding, https://github.com/openai/tiktoken
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# blanks as that pattern has them; Python counts four control characters more
BLANKS = ''.join(c for c in map(chr, range(0x3001)) if c.isspace() and not '\x1c' <= c <= '\x1f')
LONG_RUN_END = re.compile(rf'(?=[{BLANKS}][^{BLANKS}])(?<=[{BLANKS}]{{10000}})')


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding: tiktoken, with the vocabulary from the committed file and never from the network."""

    def __init__(self):
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', 'gpt2.tiktoken')
        with open(path, 'rb') as f:
            lines = f.read().splitlines()
        if len(lines) != 50256:
            raise ValueError(f"{path}: {len(lines):,} lines where GPT-2's vocabulary has 50,256; get the file again")
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        self.encoding = tiktoken.Encoding('gpt2', pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                          special_tokens={ENDOFTEXT: 50256}, explicit_n_vocab=50257)
        self.vocab_size, self.eot, self.start = 50257, 50256, 50256
        self.meta = {'name': 'gpt2', 'vocab_size': 50257}

    def encode(self, text, special_tokens=False):
        """Text -> list of ids. <|endoftext|> is plain characters, or with special_tokens the document-end id.

        tiktoken panics on a run of about a million blanks. A cut before the last blank of a run is one that the
        pattern makes anyway, and a run that ends its text goes through, so long runs are cut there.
        """
        if special_tokens and ENDOFTEXT in text:
            first, *rest = map(self.encode, text.split(ENDOFTEXT))
            return first + [i for part in rest for i in [self.eot] + part]
        if len(text) < 100_000:
            return self.encoding.encode_ordinary(text)
        return [i for part in LONG_RUN_END.split(text) for i in self.encoding.encode_ordinary(part)]

    def decode_bytes(self, ids):
        """Ids -> bytes, which may begin or end inside a character."""
        return self.encoding.decode_bytes(ids)


class CharTokenizer:
    """One id a character, in code point order, as nanoGPT's shakespeare_char: for small models and own alphabets."""

    def __init__(self, characters):
        self.characters = ''.join(sorted(set(characters)))
        self.vocab_size, self.eot = len(self.characters), None
        if not 0 < self.vocab_size <= 65536:
            raise ValueError(f'{self.vocab_size:,} distinct characters, and uint16 holds 1 to 65,536; use --tokenizer=gpt2')
        self.start = max(self.characters.find('\n'), 0)
        self.meta = {'name': 'char', 'vocab_size': self.vocab_size, 'characters': self.characters}
        self.points = code_points(self.characters)

    def encode(self, text, special_tokens=False):
        """Text -> list of ids. <|endoftext|> is plain characters, or with special_tokens a newline, which documents end in.

        Raises ValueError for a character that the tokenizer was not made with.
        """
        points = code_points(text.replace(ENDOFTEXT, '\n') if special_tokens else text)
        ids = np.searchsorted(self.points, points).clip(max=self.vocab_size - 1)
        missing = np.flatnonzero(self.points[ids] != points)
        if missing.size:
            raise ValueError(f'the character {chr(points[missing[0]])!r} is not in the char vocabulary of {self.vocab_size}: '
                             f'{self.characters[:100]!r}')
        return ids.tolist()

    def decode_bytes(self, ids):
        """Ids -> bytes of UTF-8."""
        return ''.join(self.characters[i] for i in ids).encode('utf-8', 'surrogatepass')


def code_points(text):
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')


def get_tokenizer(meta):
    """The tokenizer that a meta.json or a model file describes: {'name': 'gpt2' | 'char', …}.

    Raises ValueError for another. nanoGPT's models do not hold their characters, but `folders` where they may be.
    """
    if meta['name'] == 'gpt2':
        return GPT2Tokenizer()
    if meta['name'] == 'char':
        return CharTokenizer(meta['characters'] if 'characters' in meta else find_characters(meta['folders'], meta['vocab_size']))
    raise ValueError(f"tokenizer {meta['name']!r} is not one of gpt2, char")


def find_characters(folders, vocab_size):
    """The vocab_size characters in the first folder with a meta.json or a meta.pkl of as many. Raises ValueError."""
    for folder in folders:
        for name, read in (('meta.json', read_meta), ('meta.pkl', read_nanogpt_meta)):
            try:
                characters = read(os.path.join(folder, name))['tokenizer']['characters']
            except (OSError, ValueError, KeyError):  # none there, or of other data
                continue
            if len(characters) == vocab_size:
                return characters
    raise ValueError(f"the model has a vocabulary of {vocab_size:,}, which is not GPT-2's, and nothing says which characters it is: "
                     f"no meta.json or meta.pkl of as many in {', '.join(map(os.path.normpath, folders))}; put its data's there. "
                     f'Other vocabularies folio does not read')


def read_meta(path):
    """A meta.json's contents. Raises ValueError for a damaged one, or a tokenizer that is none."""
    with open(path, encoding='utf-8') as f:
        try:
            meta = json.load(f)
            get_tokenizer(meta['tokenizer'])
            return meta
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{path}: damaged; prepare it again with prepare.py') from None


def read_nanogpt_meta(path):
    """What a meta.json would say, of nanoGPT's meta.pkl. Raises ValueError for another file.

    A pickle can run any code through the names that it looks up; this reader looks up none.
    """
    class Values(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError
    try:
        with open(path, 'rb') as f:
            itos = Values(f).load()['itos']
        characters = ''.join(itos[i] for i in range(len(itos)))
        made = CharTokenizer(characters)
        if made.characters != characters:
            raise ValueError
        return {'tokenizer': made.meta}
    except (pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, TypeError, ValueError):
        raise ValueError(f"{path}: not nanoGPT's vocabulary of single characters in their order; prepare the data again with prepare.py") from None


class TextStream:
    """Ids to text as they come: only whole characters, which can straddle tokens, and only up to the string `stop`."""

    def __init__(self, tokenizer, stop=''):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.held = ''   # what may yet turn out to be the beginning of `stop`
        self.ended = ''  # why the text is over: 'stop string' or 'end of text'

    def feed(self, id):
        """The text that this id makes sure of, often empty; nothing once the text has ended."""
        if self.ended:
            return ''
        if id == self.tokenizer.eot:
            self.ended = 'end of text'
            return self.rest()
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([id]))
        sure = len(self.held)
        if self.stop and self.stop in self.held:
            self.ended, sure = 'stop string', self.held.index(self.stop)
        elif self.stop:
            sure -= max((n for n in range(1, min(len(self.stop), sure + 1)) if self.held.endswith(self.stop[:n])), default=0)
        text, self.held = self.held[:sure], self.held[sure:]
        return text

    def rest(self):
        """What was held back, once no more ids come; the bytes of an unfinished character are left out."""
        text, self.held = '' if self.ended == 'stop string' else self.held, ''
        return text


def find_files(input):
    """The files that `input` names: a file, a folder (all below it, hidden ones aside) or a glob; sorted by path."""
    if os.path.isfile(input):
        return [input]
    pattern = os.path.join(glob.escape(input), '**') if os.path.isdir(input) else input
    files = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not files:
        raise FileNotFoundError(f'{input or "(empty)"}: no such text file, folder or glob; name one with --input')
    return files


def sha256_of(files):
    """The hex SHA-256 of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, 'rb') as f:
            while block := f.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def read_text(path, block_bytes=2**16):
    """Yield a UTF-8 file's text block by block, newlines as they are; path 0 is standard input. Raises ValueError with the offset of a bad byte."""
    decoder, done = codecs.getincrementaldecoder('utf-8')(), 0
    with open(path, 'rb') as f:
        while True:
            block = f.read(block_bytes)
            held = len(decoder.getstate()[0])  # bytes of a character that the last block cut
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ValueError(f'{path or "standard input"}: not UTF-8 at byte {done - held + error.start:,}; convert it first, '
                                 f'for example with iconv -f latin1 -t utf-8') from None
            if not block:
                return
            done += len(block)


def read_documents(files, joiner, start=0, stop=float('inf')):
    """Yield characters start…stop of all files in turn, block by block; `joiner` (a str, or None) between two files."""
    position = 0
    for path in files:
        if path != files[0]:
            if joiner is None and start < position <= stop:
                yield None
            elif joiner and start <= position < stop:
                yield joiner
            position += len(joiner or '')
        for text in read_text(path):
            if position < stop and position + len(text) > start:
                yield text[max(start - position, 0):stop - position if stop < position + len(text) else None]
            position += len(text)


def cut_exactly(blocks):
    """Regroup blocks of text into pieces whose tokens, joined, are the whole text's. A None passes through.

    The cuts stand between a non-blank and a blank, where the pre-tokenizer cuts anyway.
    """
    held = []
    for text in blocks:
        if text is None:
            yield ''.join(held)
            yield None
            held = []
            continue
        last_blank = max(text.rfind(' '), text.rfind('\n'))
        cut = len(text[:last_blank + 1].rstrip(BLANKS))
        if cut:
            yield ''.join(held) + text[:cut]
            held = []
        held.append(text[cut:])
    yield ''.join(held)


def write_tokens(path, tokenizer, blocks, special_tokens, on_progress):
    """Encode blocks of text into a file of uint16 on all cores; return how many tokens. A None is a document's end."""
    def encode(piece):
        ids = [tokenizer.eot] if piece is None else tokenizer.encode(piece, special_tokens)
        return np.array(ids, dtype='<u2'), len(piece or '')

    count, workers = 0, os.cpu_count() or 1
    with open(path, 'wb') as f, concurrent.futures.ThreadPoolExecutor(workers) as pool:  # tiktoken lets the GIL go
        jobs = collections.deque()
        pieces = cut_exactly(blocks)
        while True:
            piece = next(pieces, jobs)  # jobs: just a mark that there are no more
            if piece is not jobs:
                jobs.append(pool.submit(encode, piece))
            if piece is jobs or len(jobs) > 4 * workers:
                if not jobs:
                    break
                ids, characters = jobs.popleft().result()
                f.write(ids.tobytes())
                count += len(ids)
                on_progress(characters)
        f.flush()
        os.fsync(f.fileno())
    return count


def check_dataset(dataset):
    """Raise ValueError for a name that is not of a folder below data/."""
    if not dataset or os.path.isabs(dataset) or '..' in dataset.replace('\\', '/').split('/'):
        raise ValueError("give the name of a folder below data/, such as 'shakespeare'")


def prepare(input='input.txt', dataset='shakespeare', tokenizer='gpt2', val_fraction=0.1, special_tokens=False, characters=''):
    """Turn text into data/<dataset>/; return its meta. Nothing there changes before the new files are whole.

    The last `val_fraction` of the characters is cut off before tokenizing. Documents (files) are joined by the
    tokenizer's document end, or by a newline where it has none. A char vocabulary is of `characters`, or else of the text's. Raises ValueError or OSError for input it cannot take.
    """
    folder = os.path.join('data', dataset)
    files = find_files(input)
    began, found, total = time.time(), set(), 0
    joiner = '\n' if tokenizer == 'char' else None
    for text in read_documents(files, joiner):
        total += len(text or '')
        if tokenizer == 'char':
            found.update(text)
    if not total:
        raise ValueError(f'{input}: empty, so there is nothing to learn; name a text with --input')
    tok = get_tokenizer({'name': tokenizer, 'characters': characters or found})
    tok.encode(''.join(sorted(found)))  # a character that is not among them is refused before anything is written
    cut = int(total * (1 - val_fraction))
    if not cut:
        raise ValueError(f'{input}: {total} characters less val_fraction {val_fraction} leave none to train on')

    os.makedirs(folder, exist_ok=True)
    done, shown = 0, began

    def on_progress(characters):
        nonlocal done, shown
        done += characters
        if time.time() - shown > 2:
            shown = time.time()
            print(f'{done / total:.0%} of {total:,} characters, {done / (shown - began) / 1e6:.1f} M/s, '
                  f'{(shown - began) * (total / done - 1):.0f} s left', file=sys.stderr)

    tokens = {}
    for split, start, stop in (('train', 0, cut), ('val', cut, total)):
        if start < stop:
            blocks = read_documents(files, joiner, start, stop)
            tokens[split] = write_tokens(f'{folder}/{split}.bin.tmp', tok, blocks, special_tokens, on_progress)
    meta = {'format_version': FORMAT_VERSION, 'tokenizer': tok.meta, 'tokens': tokens,
            'source': {'input': input, 'files': len(files), 'characters': total, 'sha256': sha256_of(files),
                       'bytes': sum(map(os.path.getsize, files))},
            'val_fraction': val_fraction, 'special_tokens': special_tokens}
    with open(f'{folder}/meta.json.tmp', 'w', encoding='utf-8') as f:
        json.dump(meta, f, indent=1)
        f.flush()
        os.fsync(f.fileno())

    # a folder with a meta.json is whole: the old one goes first, the new one comes last
    for name in ['meta.json'] + ['val.bin'] * ('val' not in tokens):
        if os.path.exists(f'{folder}/{name}'):
            os.remove(f'{folder}/{name}')
    for name in [f'{split}.bin' for split in reversed(tokens)] + ['meta.json']:
        os.replace(f'{folder}/{name}.tmp', f'{folder}/{name}')
    for split, count in tokens.items():
        print(f'{folder}/{split}.bin: {count:,} tokens')
    seconds = time.time() - began
    print(f'{folder}/meta.json: {tokenizer}, vocabulary {tok.vocab_size:,}, from {total:,} characters of {input} '
          f'in {seconds:.1f} s ({total / seconds / 1e6:.1f} M/s)')
    return meta


def load_data(dataset):
    """The splits and meta of data/<dataset>/: (train, val or None, meta), the splits as uint16 memory maps (copy on write).

    Bins without a meta.json are nanoGPT's: of the characters in its meta.pkl, or else of GPT-2's vocabulary. Raises ValueError for files
    that are not what the meta.json says.
    """
    folder = os.path.join('data', dataset)
    meta = {'tokenizer': {'name': 'gpt2', 'vocab_size': 50257}}
    if os.path.exists(f'{folder}/meta.json'):
        meta = read_meta(f'{folder}/meta.json')
    elif os.path.exists(f'{folder}/meta.pkl'):
        meta = read_nanogpt_meta(f'{folder}/meta.pkl')
    splits = []
    for split in ('train', 'val'):
        path = f'{folder}/{split}.bin'
        size = os.path.getsize(path) if split == 'train' or os.path.exists(path) else 0
        want = 2 * meta['tokens'].get(split, 0) if 'tokens' in meta else size // 2 * 2
        if size != want:
            raise ValueError(f'{path}: {size:,} bytes where {want:,} belong; prepare it again with prepare.py')
        splits.append(np.memmap(path, dtype='<u2', mode='c') if size else None)
    if splits[0] is None:
        raise ValueError(f'{folder}/train.bin: empty; prepare it again with prepare.py')
    most = meta['tokenizer']['vocab_size']
    if 'tokens' not in meta and max(split.max() for split in splits if split is not None) >= most:
        raise ValueError(f'{folder}: without a meta.json the ids are of a vocabulary of {most:,}, and some are not; prepare it again')
    return *splits, meta


if __name__ == '__main__':
    from config import configure, fail
    input = 'input.txt'      # UTF-8 text: a file, a folder (all of it) or a glob
    dataset = 'shakespeare'  # the tokens go to data/<dataset>/
    tokenizer = 'gpt2'       # gpt2 (50,257 byte pairs) or char (one id a character)
    val_fraction = 0.1       # share of the characters, at the end, kept for validation; 0 = none
    special_tokens = False   # the text <|endoftext|> is the document end, not plain characters
    configure(globals(), dict(dataset=check_dataset, tokenizer=('gpt2', 'char'), val_fraction=(0, 0.999999)))
    if special_tokens and tokenizer == 'char':
        fail('--special_tokens: a char vocabulary has no document end; leave it away, or use --tokenizer=gpt2', 2)
    prepare(input, dataset, tokenizer, val_fraction, special_tokens)
