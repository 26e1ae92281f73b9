"""Settings, one mechanism for every script.

A script states its settings as module-level scalars, a comment beside each, then calls configure(globals()) once:

    python train.py config/shakespeare.py --batch_size=32 --overwrite

applies in the order given: files (plain Python, able to read the values set so far), --key=value, --key value, --flag.
"""
import builtins
import difflib
import functools
import os
import re
import signal
import sys
import traceback
import types

given = set()  # the settings that a file or the command line has set, for a script that asks "or is it the default?"


def configure(namespace, limits=(), memory_advice='lower the sizes asked for'):
    """Override the settings in `namespace`, in place, from sys.argv; return all of them as a plain dict.

    A setting is a bool, int, float or str with a lowercase name that does not begin with an underscore. Its default's
    type is the type it keeps, except that a str whose default is 'auto' takes True and False as well. `limits` maps a name to the
    strings it may be, to (least,) or (least, greatest), or to a function that raises ValueError. Ends the process with status 2 and one line for anything
    wrong. In a script (not under test) it also sees to one-line errors (where memory runs out, with `memory_advice`) and to
    exit status 130 and 143 on signals.
    """
    if namespace.get('__name__') == '__main__':
        sys.excepthook = functools.partial(report, memory_advice=memory_advice)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    settings = {k: v for k, v in namespace.items()
                if k.islower() and not k.startswith('_') and type(v) in (bool, int, float, str)}
    auto = {key for key, value in settings.items() if value == 'auto'}
    given.clear()
    args = sys.argv[1:]

    def override(key, value, source):
        if key not in settings:
            nearest = difflib.get_close_matches(key, settings, n=1, cutoff=0)[0]
            fail(f"{source}: unknown setting {key!r}; the nearest is {nearest!r}, and --help lists all", 2)
        kind = type(settings[key])
        if type(value) is bool and key in auto or type(value) is int and kind is float:
            value = kind(value)
        if type(value) is not kind:
            name = {bool: 'a bool (True or False)', int: 'an int', float: 'a float', str: 'a str'}[kind]
            fail(f'{source}: {key} wants {name}, not {value!r}', 2)
        settings[key] = namespace[key] = value
        given.add(key)

    while args:
        arg = args.pop(0)
        if arg in ('-h', '--help'):
            print_help(namespace, settings)
            sys.exit()
        if not arg.startswith('--'):
            for key, value in run_file(arg, settings).items():
                if key in settings or not isinstance(value, (types.ModuleType, type)) and not callable(value):
                    override(key, value, arg)
            continue
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
            value = {'true': True, 'false': False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            value = text  # of the wrong type, which override() says
        override(key, value, arg)

    for key, limit in dict(limits).items():
        value = settings[key]
        if callable(limit):
            try:
                limit(value)
            except ValueError as error:
                fail(f'--{key}={value}: {error}', 2)
        elif isinstance(limit[0], str):
            if value not in limit:
                fail(f"--{key}={value}: choose one of {', '.join(limit)}", 2)
        elif not value >= limit[0]:  # written so that nan fails too
            fail(f'--{key}={value}: must be at least {limit[0]}', 2)
        elif len(limit) > 1 and value > limit[1]:
            fail(f'--{key}={value}: must be at most {limit[1]}', 2)
    return settings


def run_file(path, settings):
    """Run a config file, named from here or from folio's own folder; return the public names that it sets."""
    home = os.path.join(os.path.dirname(__file__), os.pardir, path)
    found = path if os.path.isfile(path) else home
    if not os.path.isfile(found):
        fail(f'{path}: no such config file (settings are written --key=value)', 2)
    # settings stand among the builtins: the file can read them all, and its own scope holds just what it assigns
    scope = {'__builtins__': {**vars(builtins), **settings}, '__file__': found}
    try:
        with open(found, encoding='utf-8') as f:
            exec(compile(f.read(), found, 'exec'), scope)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == found]
        line = getattr(error, 'lineno', None) or (lines[-1] if lines else None)
        fail(f"{path}{f', line {line}' if line else ''}: {type(error).__name__}: {error}", 2)
    return {key: value for key, value in scope.items() if not key.startswith('_')}


def print_help(namespace, settings):
    """The script's docstring and its settings with their comments, from its source, so that help never drifts."""
    print((namespace.get('__doc__') or '').strip())
    print('\nSettings, as --key=value, or key = value in a config file:')
    heading = ''
    with open(namespace['__file__'], encoding='utf-8') as f:
        for line in f:
            if 'configure(globals()' in line:
                break
            setting = re.match(r"\s*(\w+) = ('[^']*'|[^#]+?)\s*(?:# *(.*))?$", line)
            if setting and setting[1] in settings:
                print(heading + f"  --{setting[1]}={setting[2].strip(chr(39))}".ljust(36), setting[3] or '')
            heading = f'\n{line.strip("# ")}' if re.match(r'\s*# ', line) else ''


def fail(message, status=1):
    """End the script with one line on stderr: what was given, the limit, the way out."""
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def report(kind, error, trace, memory_advice=''):
    """sys.excepthook: one line for what users can mend (files, memory, values that our own code refuses); else a trace."""
    ours = traceback.extract_tb(trace)[-1].filename.startswith(os.path.dirname(os.path.dirname(__file__)))
    message = f'{error.filename}: {error.strerror}' if getattr(error, 'filename', None) else error
    wanted = re.search(r"([Tt]ried to allocate [\d.]+ \w+)|can't allocate memory.*?(\d+ bytes)|out of memory", str(error))
    if issubclass(kind, MemoryError) or issubclass(kind, RuntimeError) and wanted:
        size = wanted and (wanted[1] or wanted[2])
        message = f"out of memory{f' ({size})' if size else ''}; {memory_advice}"
    elif not issubclass(kind, OSError) and not (issubclass(kind, ValueError) and ours):
        return sys.__excepthook__(kind, error, trace)
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(message).split())}", file=sys.stderr)
