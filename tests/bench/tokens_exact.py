#!/usr/bin/env python3
"""The tokens of `tessera prepare` and of tiktoken, token for token: over whole files, and over generated text that is hard to cut. Also that the shards
decode to the text, byte for byte. Needs `pip install tiktoken h5py zstandard`.

    tests/bench/tokens_exact.py build/release/tessera GPT2_DIR FILE.jsonl[.zst]...

GPT2_DIR holds vocab.bpe and encoder.json. Exit code 1: something differs.
"""
import glob
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import unicodedata

import h5py
import numpy
import zstandard
from tokenizer import END, load_tiktoken


def documents_of(path):
    with open(path, "rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) if path.endswith(".zst") else file
        for line in io.TextIOWrapper(stream, encoding="utf-8", newline="\n"):
            yield json.loads(line)["text"]


def generated():
    """Texts by what is hard about them."""
    pick = random.Random(2026)
    everything = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    categories = {}
    for c in everything:
        categories.setdefault(unicodedata.category(c), []).append(c)
    for name, members in sorted(categories.items()):
        for extra in ("", " ", " a1.'s\n"):
            yield f"category {name}", "".join(pick.choices(members + list(extra) * max(1, len(members) // 8), k=3000))
    for _ in range(3):
        pick.shuffle(everything)
        yield "every character", "".join(everything)
    emoji = [chr(c) for c in range(0x1F300, 0x1FAFF)] + ["\u200d", "\ufe0f", "\U0001f3fd", " "]
    marks = [chr(c) for c in range(0x300, 0x370)] + list("aeiou ")
    cjk = [chr(c) for c in range(0x4E00, 0x9FFF)]
    kana = [chr(c) for c in range(0x3041, 0x3097)] * 20 + ["\u3002", "\u3001", "\u3000"]
    control = [chr(c) for c in [*range(32), *range(127, 160)]] + ["a", " "]
    for name, pool in (("emoji", emoji), ("marks", marks), ("CJK", cjk + ["\u3002"] * 500), ("kana", kana), ("control", control)):
        for length in (1, 100, 30_000, 300_000):
            yield name, "".join(pick.choices(pool, k=length))
    for length in (1, 2, 1000, 65_535, 65_536, 65_537, 131_072, 1_000_000):
        for before, after in (("", ""), ("x", "x"), ("x ", "\n"), ("\n\n", " x")):
            for run in (" ", "\n", "\t ", "\u00a0", "\u3000 ", "!", "\u0301", "7", "a"):
                # The regular expression of tiktoken overflows its stack on a million spaces before a word.
                if length < 1_000_000 or (before == "x" and not run.isspace()):
                    yield f"run of {length} times {run!r}", before + run * (length // len(run)) + after
    for letters in ("etaoinshrdlu", "ab", "0123456789", "\u00e9\u00e8", "".join(cjk[:500])):
        for length in (66_000, 1_000_000, 2_000_000 // len(letters[0].encode())):
            yield f"word of {length} characters", "some text \u3042" + "".join(pick.choices(letters, k=length)) + " and more"
    for _ in range(300):
        yield "mixture", "".join(pick.choices(everything, k=pick.randint(1, 2000))) + " " * pick.randint(0, 50) + "the end's"


def lone_bytes():
    """Bytes that are no UTF-8, between texts: what tiktoken says of each part."""
    pick = random.Random(7)
    for bad in [bytes([b]) for b in range(128, 256)] + [b"\xe3\x81", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\x80"]:
        yield [bad]
        yield ["the cat  ", bad, " sat's"]
        yield [bad, "".join(pick.choices("ab \n\u3042", k=70_000)), bad, bad, "end"]
        yield ["x" * 70_000, bad, "y" * 70_000]


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    tessera, folder, files = sys.argv[1], sys.argv[2], sorted(sys.argv[3:])
    encoding = load_tiktoken(folder)
    end = encoding.encode_single_token(END)

    def encode_parts(parts):
        tokens = []
        for part in parts:
            tokens += encoding.encode_ordinary(part) if isinstance(part, str) else [encoding.encode_single_token(bytes([b])) for b in part]
        return tokens

    def to_bytes(parts):
        return b"".join(p.encode() if isinstance(p, str) else p for p in parts)

    def compare(inputs, documents, what):
        with tempfile.TemporaryDirectory() as scratch:
            command = [tessera, "prepare", "--input", *inputs, "--tokenizer", f"gpt2:{folder}", "--output", f"{scratch}/data", "--validation-fraction", "0",
                       "--shard-tokens", "10000000"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            ours = numpy.concatenate([h5py.File(f)["tokens"][:] for f in sorted(glob.glob(f"{scratch}/data/train/*.h5"))])
        at = count = size = different = 0
        for name, parts in documents:
            text = to_bytes(parts)
            if not text:
                continue
            tokens = numpy.array([end] + encode_parts(parts))
            mine = ours[at:at + len(tokens)]
            if not numpy.array_equal(mine, tokens):
                different += 1
                print(f"{what}: document {count} ({name}, {len(text)} bytes) differs")
                break
            if encoding.decode_bytes([int(t) for t in mine[1:]]) != text:
                different += 1
                print(f"{what}: document {count} ({name}) does not decode to its text")
            at, count, size = at + len(tokens), count + 1, size + len(text)
        if at != len(ours):
            different += 1
            print(f"{what}: {len(ours)} tokens, tiktoken has {at}")
        print(f"{what}: {count} documents, {size} bytes, {at} tokens: {'NOT the same' if different else 'all the same, and decode to the text'}")
        return different

    different = compare(files, ((os.path.basename(f), [text]) for f in files for text in documents_of(f)), "files")
    with tempfile.TemporaryDirectory() as scratch:
        texts = [(name, [text]) for name, text in generated()]
        with open(f"{scratch}/a.jsonl", "w", encoding="ascii") as file:
            for _, parts in texts:
                file.write(json.dumps({"text": parts[0]}) + "\n")
        different += compare([f"{scratch}/a.jsonl"], texts, "generated, .jsonl")
        plain = [(name, parts) for name, parts in texts if len(parts[0]) > 60_000]
        plain += [("lone bytes", parts) for parts in lone_bytes()]
        for i, (_, parts) in enumerate(plain):
            with open(f"{scratch}/{i:05}.txt", "wb") as file:
                file.write(to_bytes(parts))
        different += compare([f"{scratch}/*.txt"], plain, "generated and lone bytes, .txt")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
