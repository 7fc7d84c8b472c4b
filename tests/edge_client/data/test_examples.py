import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.data import tokenize
from edge_client.data.rows import Dialogue, Text, load
from edge_client.data.tokenize import Example, windows
from oneround.errors import BadData, BadModel

TEXT = {"text": "Once upon a time."}
EXCHANGE = {"prompt": "2 + 2?", "completion": "4"}
ALPACA = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
TURNS = ({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"})
CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def many(row: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Rows of one kind with different content."""
    return [json.loads(json.dumps(row).replace("2", str(i)).replace("time", f"time {i}")) for i in range(count)]


# ---- every format ----


@pytest.mark.parametrize("row", [TEXT, EXCHANGE, ALPACA, CHAT], ids=["text", "exchange", "alpaca", "chat"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "lines.json"])
def test_every_format_in_every_file(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    file = tmp_path / name
    wanted = many(row, 30)
    file.write_text(json.dumps(wanted, indent=1) if name == "data.json" else lines(wanted))
    rows = load(file)
    assert len(rows.train) + len(rows.held_out) == 30 and rows.train and rows.held_out
    assert rows.files == (file,) and rows.skipped == 0
    first = next(
        r for r in rows.train + rows.held_out if r.where == (f"{file}:1" if name != "data.json" else f"{file}:2")
    )
    if row is TEXT:
        assert first == Text(first.where, "Once upon a time 0.")
    else:
        assert isinstance(first, Dialogue)
        assert [turn["role"] for turn in first.messages] == ["user", "assistant"]
        assert (first.plain is None) == (row is CHAT)


@pytest.mark.parametrize("row", [TEXT, EXCHANGE, ALPACA, CHAT], ids=["text", "exchange", "alpaca", "chat"])
def test_a_parquet_file_gives_the_rows_of_the_same_jsonl(tmp_path: Path, row: dict[str, Any]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    wanted = many(row, 2500)  # more than one batch of them
    (tmp_path / "data.jsonl").write_text(lines(wanted))
    # As the hub's tables are: columns that some rows lack are null there, also within messages.
    tabled = [dict(each, source=None if n % 2 else "forum") for n, each in enumerate(wanted)]
    if row is CHAT:
        for each in tabled:
            each["messages"] = [dict(turn, tool_calls=None) for turn in each["messages"]]
        tabled[-1]["messages"][-1]["tool_calls"] = None
    parquet.write_table(pyarrow.Table.from_pylist(tabled), tmp_path / "data.parquet", row_group_size=700)
    by_json, by_table = load(tmp_path / "data.jsonl"), load(tmp_path / "data.parquet")
    for one, other in ((by_json.train, by_table.train), (by_json.held_out, by_table.held_out)):
        assert len(one) == len(other) > 100
        for a, b in zip(one, other, strict=True):
            assert b.where == a.where.replace(".jsonl", ".parquet")
            assert replace(b, where=a.where) == a


def test_a_bad_parquet_file_or_row_is_named(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "data.parquet"
    file.write_bytes(b"PAR1 and nothing like it PAR1")
    with pytest.raises(BadData, match=r"data\.parquet is not a Parquet file"):
        load(file)
    parquet.write_table(pyarrow.Table.from_pylist([{"text": f"row {n}"} for n in range(50)]), file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(BadData, match=r"data\.parquet is not a Parquet file"):
        load(file)
    parquet.write_table(pyarrow.Table.from_pylist([*({"text": f"row {n}"} for n in range(40)), {"text": None}]), file)
    with pytest.raises(BadData, match=r"data\.parquet:41"):
        load(file)
    assert load(file, skip_bad_rows=True).skipped == 1
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), file)
    with pytest.raises(BadData, match="the file is empty"):
        load(file)


def test_alpaca_has_the_classic_prompt_and_a_plain_user_turn(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines([ALPACA, {"instruction": "Say hi.", "input": "", "output": "hi", "text": "all of it"}]))
    rows = load(file)
    full, short = sorted(rows.train + rows.held_out, key=lambda row: row.where)
    assert isinstance(full, Dialogue) and isinstance(short, Dialogue)
    assert full.messages[0]["content"] == "Add.\n\n2 and 2"
    assert full.plain and "further context. Write" in full.plain[0]
    assert full.plain[0].endswith("### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:\n")
    assert short.messages[0]["content"] == "Say hi."
    assert short.plain and "### Input" not in short.plain[0] and "describes a task. Write" in short.plain[0]


def test_prompt_and_completion_may_be_messages(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines([{"prompt": [*TURNS, TURNS[0]], "completion": [TURNS[1]]}, EXCHANGE]))
    row = next(row for row in load(file).train + load(file).held_out if row.where.endswith(":1"))
    assert row == Dialogue(row.where, (*TURNS, *TURNS), learn_from=3)


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + lines([TEXT]).encode() + b"\r\n\n" + lines([{"text": "é"}]).encode() + b"\n")
    rows = load(file)
    assert {row.where for row in rows.train + rows.held_out} == {f"{file}:1", f"{file}:4"}


# ---- folders ----


def test_a_folder_as_mlx_lm_has_it(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(lines([TEXT]))
    (tmp_path / "notes.txt").write_text("not for training")
    (tmp_path / "test.jsonl").write_text(lines([{"text": "test"}]))
    assert [row.text for row in load(tmp_path).held_out if isinstance(row, Text)] == ["test"]
    (tmp_path / "valid.json").write_text(json.dumps([{"text": "valid"}]))
    for path in (tmp_path, tmp_path / "train.jsonl"):
        rows = load(path)
        assert [row.text for row in rows.held_out if isinstance(row, Text)] == ["valid"]
        assert rows.files == (tmp_path / "train.jsonl", tmp_path / "valid.json")
        assert len(rows.train) == 1


def test_a_folder_of_anything(tmp_path: Path) -> None:
    for name, text in {"b.txt": "second", "a.txt": "first", "._a.txt": "apple", "x.png": "pixels"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "c.jsonl").write_text(lines(many(EXCHANGE, 3)))
    rows = load(tmp_path)
    assert rows.files == tuple(tmp_path / name for name in ("a.txt", "b.txt", "c.jsonl"))
    assert len(rows.train + rows.held_out) == 5
    (tmp_path / "validation.txt").write_text("held out")
    rows = load(tmp_path)
    assert [row.where for row in rows.held_out] == [f"{tmp_path / 'validation.txt'}:1"]
    assert len(rows.train) == 5


# ---- errors name the file and the line ----


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"text": "a"', "expected a JSON object on one line"),
        ('["text"]', "expected a JSON object, found an array"),
        ('{"question": 1, "answer": 2}', "found the keys question, answer; expected text, as in the rows before"),
        ('{"text": 3}', "expected `text` to be a string, found a number"),
        ('{"text": "  "}', "expected `text` to hold text, it is empty"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
        ("[" * 100_000, "not JSON that can be read"),
        ("1" * 5000, "not JSON that can be read"),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, bad: str, says: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(lines(many(TEXT, 16)) + bad + "\n" + lines(many(TEXT, 4)))
    with pytest.raises(BadData, match=r"data\.jsonl:17") as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}:17: ") and says in str(caught.value)
    assert "--skip-bad-rows" in caught.value.hint
    rows = load(file, skip_bad_rows=True)
    assert rows.skipped == 1 and len(rows.train + rows.held_out) == 20


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": []}, "expected a list of messages, found an empty array"),
        ({"messages": "hello"}, "expected a list of messages, found a string"),
        ({"messages": [{"from": "human"}]}, "each message to be an object with `role` and `content`"),
        ({"messages": [{"role": "user", "content": None}]}, "`content` of a message to be a string"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "at least one message of the assistant"),
        ({"prompt": "hi", "completion": ""}, "expected `completion` to hold text"),
        ({"prompt": None, "completion": "x"}, "expected `prompt` to be a string, found null"),
        ({"instruction": "hi", "input": {}, "output": ""}, "expected `output` to hold text"),
        ({"instruction": "hi", "input": {"a": 1}, "output": "x"}, "expected `input` to be a string, found an object"),
        ({"conversations": []}, "a row has `messages`, or `prompt` and `completion`"),
    ],
)
def test_a_bad_row_says_what_was_expected(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    for name, content, line in (("a.jsonl", "\n" + json.dumps(row), 2), ("a.json", f"[\n\n{json.dumps(row)}]", 3)):
        file = tmp_path / name
        file.write_text(content)
        with pytest.raises(BadData) as caught:
            load(file)
        assert str(caught.value).startswith(f"{file}:{line}: ") and says in str(caught.value)
        with pytest.raises(BadData, match=r"no rows in .*the first problem: "):
            load(file, skip_bad_rows=True)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.txt", b" \n", "a.txt: the file is empty"),
        ("a.json", b"[]", "no rows in"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "a.json:2: not JSON: "),
        ("a.json", b'[{"text": "a"}\n\n{"text": "b"}]', "a.json:3: not JSON: expected , or ]"),
        ("a.json", b'[{"text": "a"}]\nmore', "a.json:1: not JSON: expected the file's end"),
        ("a.json", b'[{"text": "a"},', "a.json:1: not JSON: "),
        ("a.json", b"[" * 100_000, "a.json: not JSON that can be read"),
        ("a.txt", b"one\ntwo\xff", "a.txt:2: expected UTF-8 text, found byte 0xff"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "a.jsonl:2: expected UTF-8 text, found byte 0xe9"),
        ("a.json", b'[{"text":\n "\xe9"}]', "a.json:2: expected UTF-8 text"),
        (
            "a.csv",
            b"a,b",
            "a.csv: this kind of file is not known; accepted are files ending in .jsonl, .json, .parquet, .txt",
        ),
        ("a.txt", b"x", "a.txt:1: the text is too short"),
        ("a.jsonl", json.dumps(EXCHANGE).encode(), "a.jsonl:1: the only example"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData) as caught:
        load(tmp_path / name)
    assert says in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="is not there") as caught:
        load(tmp_path / "data")
    assert "--data" in caught.value.hint
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(
        BadData, match=r"holds no training data: accepted are files ending in \.jsonl, \.json, \.parquet, \.txt"
    ):
        load(tmp_path)


# ---- held out ----


def texts(rows: tuple[Any, ...]) -> set[str]:
    return {row.text for row in rows}


@given(
    st.lists(st.text("abc", min_size=1), min_size=2, max_size=30, unique=True), st.randoms(), st.text("d", min_size=1)
)
def test_held_out_depends_on_content_alone(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], random: Any, new: str
) -> None:
    file = tmp_path_factory.mktemp("data") / "a.jsonl"

    def split(content: list[str]) -> tuple[set[str], set[str]]:
        file.write_text(lines([{"text": text} for text in content]))
        rows = load(file)
        assert len(rows.train) + len(rows.held_out) == len(content)
        return texts(rows.train), texts(rows.held_out)

    train, held_out = split(words)
    assert train and held_out and not train & held_out
    again = list(words)
    random.shuffle(again)
    assert split(again) == (train, held_out)
    assert split([*words, words[0]]) == (train, held_out) or len(words) == 2
    _, more = split([*words, new])
    # Only where the last row was kept for training by force may a newcomer free it to be held out.
    assert more - {new} <= held_out or len(train) == 1


def test_a_tenth_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines(many(EXCHANGE, 3000)))
    assert 240 < len(load(file).held_out) < 360


def in_another_process(path: Path) -> tuple[set[str], set[str]]:
    """(train, held out) there, with other hashes of strings."""
    program = (
        "import json, sys\nfrom pathlib import Path\nfrom edge_client.data.rows import load\n"
        "rows = load(Path(sys.argv[1]))\n"
        "print(json.dumps([[row.text for row in side] for side in (rows.train, rows.held_out)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        text=True,
    )
    train, held_out = json.loads(done.stdout)
    return set(train), set(held_out)


def test_the_same_rows_are_held_out_whenever_and_wherever(tmp_path: Path) -> None:
    """In another process, from files of other names and another order, in another format, and beside new files."""
    texts_ = [f"note {n}" for n in range(300)]
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "a.jsonl").write_text(lines([{"text": text} for text in texts_[:150]]))
    (here / "b.jsonl").write_text(lines([{"text": text} for text in texts_[150:]]))
    (there / "2.json").write_text(json.dumps([{"text": text} for text in texts_[:100]]))
    (there / "1.jsonl").write_text(lines([{"text": text, "source": "ward"} for text in reversed(texts_[100:])]))
    rows = load(here)
    train, held_out = texts(rows.train), texts(rows.held_out)
    assert len(held_out) > 15 and not train & held_out
    assert in_another_process(here) == in_another_process(there) == (train, held_out)
    (here / "0.jsonl").write_text(lines([{"text": f"later note {n}"} for n in range(200)]))
    more = load(here)
    assert texts(more.train) & set(texts_) == train and texts(more.held_out) & set(texts_) == held_out
    assert texts(more.held_out) > held_out


def test_a_folders_files_are_each_of_their_own_format(tmp_path: Path) -> None:
    for name, row in {"a": TEXT, "b": EXCHANGE, "c": ALPACA, "d": CHAT}.items():
        (tmp_path / f"{name}.jsonl").write_text(lines(many(row, 5)))
    rows = load(tmp_path)
    found = sorted(rows.train + rows.held_out, key=lambda row: row.where)
    assert [type(row) for row in found] == [Text] * 5 + [Dialogue] * 15
    (tmp_path / "b.jsonl").write_text(lines([EXCHANGE, ALPACA]))
    with pytest.raises(BadData, match=r"b\.jsonl:2: found the keys instruction, input, output; expected prompt and"):
        load(tmp_path)


def test_equal_rows_still_give_both_sides(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines([TEXT] * 3))
    rows = load(file)
    assert (len(rows.train), len(rows.held_out)) == (2, 1)


@pytest.mark.parametrize(("mark", "size"), [("\n\n", 40), ("\n", 40), (" ", 40), ("", 1)])
def test_a_lone_text_is_cut_near_its_last_tenth(tmp_path: Path, mark: str, size: int) -> None:
    file = tmp_path / "a.txt"
    text = mark.join("abcdefgh" * (size // 8) or "x" for _ in range(1000))
    file.write_text(text)
    rows = load(file)
    (train,), (held_out,) = rows.train, rows.held_out
    assert isinstance(train, Text) and isinstance(held_out, Text)
    assert train.text + held_out.text == text
    assert train.text.endswith(mark)
    assert 0.05 <= len(held_out.text) / len(text) <= 0.15


# ---- rows → examples ----


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes for tokens, with ids 0 to 255, and three special ones; ids 256 is the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<eos>", "<|im_start|>", "<|im_end|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", model_max_length=64)
    made.chat_template = CHATML
    return made


@pytest.fixture
def plain(tokenizer: Any) -> Any:
    """The same without a chat template."""
    from copy import copy

    made = copy(tokenizer)
    made.chat_template = None
    return made


def learnt(tokenizer: Any, example: Example) -> str:
    return str(tokenizer.decode(example.ids[example.is_target]))


def test_text_is_learnt_whole_and_ended(tokenizer: Any) -> None:
    (example,) = tokenize.tokenise([Text("a:1", "Hello.")], tokenizer, 512).examples
    assert tokenizer.decode(example.ids) == "Hello.<eos>"
    assert learnt(tokenizer, example) == "ello.<eos>"


def test_every_assistant_turn_is_learnt_and_nothing_else(tokenizer: Any) -> None:
    system = {"role": "system", "content": "Add."}
    more = ({"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "six"})
    thanks = {"role": "user", "content": "thanks"}
    (example,) = tokenize.tokenise([Dialogue("a:1", (system, *TURNS, *more, thanks))], tokenizer, 512).examples
    assert learnt(tokenizer, example) == "4<|im_end|>\nsix<|im_end|>\n"
    (example,) = tokenize.tokenise([Dialogue("a:1", (*TURNS, *more), learn_from=3)], tokenizer, 512).examples
    assert learnt(tokenizer, example) == "six<|im_end|>\n"


def test_turns_of_a_template_that_writes_the_last_one_otherwise(tokenizer: Any) -> None:
    """As Qwen3's, which puts thoughts in front of the last turn and leaves them out of those before it."""
    from copy import copy

    thinking = copy(tokenizer)
    thinking.chat_template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
    )
    more = ({"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "six"})
    (example,) = tokenize.tokenise([Dialogue("a:1", (*TURNS, *more))], thinking, 512).examples
    assert learnt(thinking, example) == "4<|im_end|>\n<think>\n\n</think>\n\nsix<|im_end|>\n"


def test_a_conversations_tools_reach_the_template(tokenizer: Any, tmp_path: Path) -> None:
    from copy import copy

    knowing = copy(tokenizer)
    knowing.chat_template = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + CHATML
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    (tmp_path / "a.jsonl").write_text(lines([{**CHAT, "tools": [tool]}, {**CHAT, "tools": [tool, tool]}]))
    rows = load(tmp_path / "a.jsonl")
    made = tokenize.tokenise(rows.train + rows.held_out, knowing, 512).examples
    assert sorted(str(knowing.decode(example.ids)).split("<")[0] for example in made) == ["[add]", "[add][add]"]
    assert {learnt(knowing, example) for example in made} == {"4<|im_end|>\n"}


def test_an_exchange_with_and_without_a_chat_template(tokenizer: Any, plain: Any) -> None:
    row = Dialogue("a:1", TURNS, learn_from=1, plain=("2 + 2?", " 4"))
    (example,) = tokenize.tokenise([row], tokenizer, 512).examples
    assert tokenizer.decode(example.ids).startswith("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4")
    assert learnt(tokenizer, example) == "4<|im_end|>\n"
    (example,) = tokenize.tokenise([row], plain, 512).examples
    assert plain.decode(example.ids) == "2 + 2? 4<eos>"
    assert learnt(plain, example) == " 4<eos>"


def test_messages_need_a_chat_template(plain: Any) -> None:
    with pytest.raises(BadData, match="a:1: the model has no chat template") as caught:
        tokenize.tokenise([Dialogue("a:1", TURNS)], plain, 512, skip_bad_rows=True)
    assert "`completion`" in caught.value.hint


def test_a_conversation_that_the_template_refuses(tokenizer: Any) -> None:
    rows = [Dialogue("a:7", ({"role": "tool", "content": "x"}, *TURNS)), Dialogue("a:8", TURNS)]
    with pytest.raises(BadData, match=r"a:7: the model's chat template refuses this conversation: no tools"):
        tokenize.tokenise(rows, tokenizer, 512)
    got = tokenize.tokenise(rows, tokenizer, 512, skip_bad_rows=True)
    assert (len(got.examples), got.skipped) == (1, 1)


def test_truncation_is_counted(plain: Any, recwarn: pytest.WarningsRecorder, capfd: Any) -> None:
    rows = [
        Dialogue("a:1", TURNS, 1, plain=("ab", "c")),
        Dialogue("a:2", TURNS, 1, plain=("ab", "c" * 100)),
        Dialogue("a:3", TURNS, 1, plain=("ab" * 50, "c")),
        Text("a:4", "abcdefghijkl"),
    ]
    got = tokenize.tokenise(rows, plain, 8)
    assert (len(got.examples), got.truncated, got.dropped, got.skipped) == (4, 1, 1, 0)
    assert max(len(example.ids) for example in got.examples) == 8
    assert capfd.readouterr() == ("", "")  # transformers does not warn of long sequences either


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(2, 12))
def test_windows_lose_nothing(ids: list[int], max_seq_len: int) -> None:
    pieces = windows(ids, max_seq_len)
    assert [int(i) for piece in pieces for i in piece.ids[piece.is_target]] == ids[1:]
    assert all(2 <= len(piece.ids) <= max_seq_len and not piece.is_target[0] for piece in pieces)
    assert all(a.ids[-1] == b.ids[0] for a, b in itertools.pairwise(pieces))
    if pieces:
        assert pieces[0].ids[0] == ids[0] and pieces[0].ids.dtype == np.int32
        assert all(len(piece.ids) == max_seq_len for piece in pieces[:-1])


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="holds no tokenizer"):
        tokenize.load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadModel, match="holds no tokenizer"):
        tokenize.load_tokenizer(tmp_path)
