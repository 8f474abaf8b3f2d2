#!/usr/bin/env bash
# Workaround: llava_bidir/data/json_stream.py replaces half surrogates before ijson reads them.
#
# Half of a surrogate pair in JSON: one parser of ijson says "?", another gives half a character, and the order decides.
#
# Guess: all backends of ijson read the escape \ud83d without its other half as Python's json does, as a lone surrogate
# that cannot be encoded later, or all raise.
# Found (ijson 3.6.0): yajl2_c, the default where it is built, reads a high half as "?", which nothing can tell from a
# question mark of the author, and raises UnicodeDecodeError for a low half. The backend in Python reads both as json does.
# Who meets it: records whose text was cut at a number of UTF-16 units, as many crawls have, read as a stream. A model is
# trained on question marks.
#
# Needs Python >= 3.10 and a network; works in a temporary folder. Fails if the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install -q ijson==3.6.0
"$work/env/bin/python" - <<'PY'
import ijson

TEXTS = {"high half": b'"a\\ud83d"', "low half": b'"a\\ude00"', "high half, then text": b'"a\\ud83db"'}


def read(backend, text):
    try:
        return ascii(next(ijson.get_backend(backend).items(text, "")))
    except Exception as error:
        return type(error).__name__


found = {backend: [read(backend, text) for text in TEXTS.values()] for backend in ("yajl2_c", "python")}
print(*TEXTS, sep=" | ")
for backend, values in found.items():
    print(f"{backend}:", *values, sep=" | ")
assert found["yajl2_c"] == ["'a?'", "UnicodeDecodeError", "'a?b'"], "the behaviour has changed"
assert found["python"] == [r"'a\ud83d'", r"'a\ude00'", r"'a\ud83db'"], "the behaviour has changed"
PY
