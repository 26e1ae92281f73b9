"""Settings: one mechanism for every script.

A script states its settings as module-level values, each with a comment, and calls configure(globals()) once:

    python train.py config/shakespeare.py --batch_size=32 --overwrite

Config files, --key=value, --key value and --flag apply in the order given. A config file is plain Python and
can read the values set so far.
"""
import builtins
import difflib
import os
import re
import signal
import sys
import traceback

given = set()  # names of the settings that a config file or the command line has set


def configure(namespace, limits=None, memory_advice='lower the sizes asked for'):
    """Override the settings in `namespace` by sys.argv, in place; return all of them as a dict.

    A setting is a bool, int, float or str whose name is lowercase and has no leading underscore. Its type
    is kept. `limits` maps its name to (least,) or (least, greatest), to a tuple of the strings allowed, or
    to a function that raises ValueError; by default a number must be at least 0. A wrong setting ends the
    process with one line and status 2.

    In a script that is run (not imported by a test), other errors are one line too, with `memory_advice` if
    memory runs out, and Ctrl-C and SIGTERM end the process at once with status 130 and 143.
    """
    if namespace.get('__name__') == '__main__':
        sys.excepthook = lambda *raised: report(*raised, memory_advice)
        on_signals(end)
        sys.stdin = sys.stdin or open(os.devnull, encoding='utf-8')  # None if the shell closed it
        sys.stderr = sys.stderr or open(os.devnull, 'w', encoding='utf-8')
        for stream in filter(None, (sys.stdin, sys.stdout)):
            stream.reconfigure(encoding='utf-8', errors='surrogateescape')  # takes any bytes, in any locale
    settings = {key: value for key, value in namespace.items()
                if key.islower() and not key.startswith('_') and type(value) in (bool, int, float, str)}
    defaults, args = dict(settings), sys.argv[1:]
    given.clear()
    while args:
        arg = args.pop(0)
        if arg in ('-h', '--help'):
            print_help(namespace, settings)
            sys.exit()
        new = parse(arg, args, settings) if arg.startswith('--') else run_file(arg, settings)
        for key, value in new.items():
            settings[key] = namespace[key] = checked(key, value, defaults, arg)
            given.add(key)
    numbers = {key: (0,) for key, value in settings.items() if type(value) is not str}
    for key, limit in {**numbers, **(limits or {})}.items():
        check_limit(key, settings[key], limit)
    return settings


def merge(settings, namespace, kept, fixed, owner):
    """Set the settings that were not given to the values in `kept`, a checkpoint's, in both dicts.

    Names in `kept` that are no longer settings are ignored. Ends the process if a name in `fixed` was given
    a value other than that of `owner`, the checkpoint.
    """
    for key, value in kept.items():
        if key in given and key in fixed and settings[key] != value:
            fail(f'--{key}={settings[key]}: {owner} has {value}; leave it out, also in config files', 2)
        if key in settings and key not in given:
            settings[key] = namespace[key] = value


def parse(arg, args, settings):
    """{key: value} of the option `arg`, not checked yet; the value of `--key value` is taken from `args`."""
    key, equals, text = arg[2:].partition('=')
    kind = type(settings.get(key, ''))
    if not equals and key in settings:
        if kind is bool and not (args and args[0].lower() in ('true', 'false')):
            text = 'True'
        elif args and not args[0].startswith('--'):
            text = args.pop(0)
        else:
            fail(f'--{key} needs a value, as in --{key}={settings[key]}', 2)
    try:
        return {key: {'true': True, 'false': False}[text.lower()] if kind is bool else kind(text)}
    except (KeyError, ValueError):
        return {key: text}  # of the wrong type; checked() refuses it


def run_file(path, settings):
    """{key: value} of what a config file sets. Its path is relative to the current folder, or to folio's."""
    found = path if os.path.isfile(path) else os.path.join(os.path.dirname(__file__), os.pardir, path)
    if not os.path.isfile(found) or not path.endswith('.py'):  # a text is not run as Python
        fail(f'{path}: no such config file, NAME.py (settings are written --key=value)', 2)
    # settings are the file's builtins: it can read them, and `scope` holds only what it assigns
    scope = {'__builtins__': {**vars(builtins), **settings}, '__file__': found}
    try:
        with open(found, encoding='utf-8') as f:
            exec(compile(f.read(), found, 'exec'), scope)
    except BaseException as error:  # a file may raise KeyboardInterrupt too
        ran = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == found]
        line = ran[-1] if ran else getattr(error, 'lineno', None)  # a SyntaxError comes before any line runs
        fail(f"{path}{f', line {line}' if line else ''}: {type(error).__name__}: {error}", 2)
    # modules (which have a __name__) and callables are the file's own business
    own = {key for key, value in scope.items() if callable(value) or hasattr(value, '__name__')} - {*settings}
    return {key: scope[key] for key in scope if key not in own and not key.startswith('_')}


def checked(key, value, defaults, source):
    """`value` in the setting's type. A float setting takes an int; an 'auto' setting takes True and False."""
    if key not in defaults:
        nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0)[0]
        fail(f'{source}: unknown setting {key!r}; the nearest is {nearest!r}, and --help lists all', 2)
    kind = type(defaults[key])
    if type(value) is bool and defaults[key] == 'auto' or type(value) is int and kind is float:
        value = kind(value)
    if type(value) is not kind:
        fail(f'{source}: {key} must be of type {kind.__name__}, not {value!r}', 2)
    if kind is str and ('\0' in value or value.encode('utf-8', 'ignore').decode() != value):
        fail(f'{source}: {key} must be UTF-8 text without a NUL, not {value!r}', 2)
    return value


def check_limit(key, value, limit):
    """End the process if a setting's value is outside its limit; see configure()."""
    if callable(limit):
        try:
            limit(value)
        except ValueError as error:
            fail(f'--{key}={value}: {error}', 2)
    elif isinstance(limit[0], str):
        if value not in limit:
            fail(f"--{key}={value}: choose one of {', '.join(limit)}", 2)
    elif not value >= limit[0]:  # not `<`, which would accept nan
        fail(f'--{key}={value}: must be at least {limit[0]}', 2)
    elif value > (*limit, 2**63 - 1)[1]:  # the greatest integer of torch and numpy
        fail(f'--{key}={value}: must be at most {(*limit, 2**63 - 1)[1]}', 2)


def print_help(namespace, settings):
    """Print the script's docstring, and its settings and their comments as its source has them."""
    print((namespace['__doc__'] or '').strip(), '\nSettings, as --key=value or in a config file:', sep='\n')
    with open(namespace['__file__'], encoding='utf-8') as f:
        source = f.read().split('configure(globals()')[0].split("\nif __name__ == '__main__':")[-1]
    pattern = r"(?m)^(?: *# (.*)\n)? *(\w+) = ('[^']*'|[^#\n]+?) *(?:# *(.*))?$"
    for heading, key, value, comment in re.findall(pattern, source):
        if key in settings:
            print((heading and f'\n{heading}\n') + f'  --{key}={value.strip(chr(39))}'.ljust(36), comment)


def on_signals(action):
    """Set what Ctrl-C, SIGTERM and a closed terminal do: a function of (number, frame), or signal.SIG_DFL."""
    hangup = getattr(signal, 'SIGHUP', signal.SIGTERM)  # Windows has none; SIGTERM is then set twice
    for number in (signal.SIGINT, signal.SIGTERM, hangup):
        if number != hangup or signal.getsignal(hangup) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, action)


def end(number, frame):
    """A signal handler that ends the process at once: status 128 + its number, as shells count."""
    on_signals(signal.SIG_DFL)  # a second signal must not raise while Python leaves
    sys.exit(128 + number)


def fail(message, status=1):
    """End the script with one line on stderr: what was given, the limit, the way out."""
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def report(kind, error, trace, memory_advice):
    """sys.excepthook: a line for what a user can fix (files, memory, values, packages), else a traceback."""
    home = os.path.dirname(os.path.dirname(__file__))
    ours = os.path.dirname(traceback.extract_tb(trace)[-1].filename) in (home, os.path.dirname(__file__))
    message = f'{error.filename}: {error.strerror}' if getattr(error, 'filename', None) else error
    size = re.search(r'[Tt]ried to allocate [\d.]+ \w+', str(error))
    from_torch = issubclass(kind, RuntimeError) and (size or re.search('out of memory|overflow', str(error)))
    if issubclass(kind, MemoryError) or from_torch:
        message = f"out of memory{f' ({size[0]})' if size else ''}; {memory_advice}"
    elif issubclass(kind, ModuleNotFoundError) and error.name:
        message = f"{error}; pip install {error.name.split('.')[0]}"
    elif not issubclass(kind, OSError) and not (issubclass(kind, ValueError) and ours):
        return sys.__excepthook__(kind, error, trace)
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(message).split())}", file=sys.stderr)
