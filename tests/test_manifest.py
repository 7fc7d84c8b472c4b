"""The manifest: its schema, what is written, and what is read of documents that anybody may have written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneround import manifest, typed_json
from oneround.errors import BadData
from oneround.manifest import (
    ContributionEntry,
    FileCheck,
    FileEntry,
    Manifest,
    QuantisedEntry,
    ReadBack,
    StartedFrom,
)

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "docs" / "manifest.schema.json"
JOB = {"name": "notes", "lora": {"rank": 16, "target_modules": ["all-linear"]}, "aggregate": {"method": "exact"}}

# As a coordinator wrote it before there was a type, key for key.
WRITTEN_BEFORE = {
    "job": JOB,
    "job_id": "1" * 32,
    "version": 2,
    "reason": "all 2 contributions are in",
    "base_fingerprint": "0" * 64,
    "base_rounding": 0.0,
    "method": "exact",
    "rank": 5,
    "energy_kept": 1.0,
    "started_from": {"job": "first", "job_id": "2" * 32, "version": 1, "digest": "3" * 64},
    "contributions": [
        {
            "client": "Zoë",
            "id": "a" * 12,
            "digest": "4" * 64,
            "num_examples": 30,
            "weight": 0.75,
            "verdict": "admitted",
            "reason": "",
            "norm": 1.25,
            "cosine": None,
        },
        {
            "client": "ben",
            "id": "b" * 12,
            "digest": "5" * 64,
            "num_examples": 10,
            "weight": 0.0,
            "verdict": "quarantined",
            "reason": "factor B holds NaN or Inf",
        },
    ],
    "quantised": {"notes-q8_0.gguf": {"types": {"Q8_0": 7, "F32": 3}, "fallbacks": {}}},
    "verification": {
        "notes-q8_0.gguf": {
            "measure": "mean_divergence",
            "value": 0.001,
            "bound": 0.02,
            "against": "f16",
            "top1_agreement": 0.99,
            "perplexity": 10.5,
            "perplexity_against": 10.4,
            "passed": True,
        }
    },
    "adapter_effect": 0.3,
    "withheld": {"notes-q4_k_m.gguf": "mean divergence from f16 is 0.4, over 0.25"},
    "made_with": {"oneround": "0.1.0"},
    "files": {"peft/adapter_config.json": {"sha256": "6" * 64, "size": 512}},
}  # fmt: skip
# What the first coordinators wrote: no ids, verdicts or reasons, and less of every check.
FIRST = {
    "job": JOB,
    "version": 1,
    "base_fingerprint": "0" * 64,
    "rank": 4,
    "contributions": [{"client": "anna", "digest": "4" * 64, "num_examples": 30, "weight": 1.0}],
    "verification": {
        "notes-f16.gguf": {
            "measure": "max_logit_difference", "value": 0.01, "bound": 0.1, "top1_agreement": 1.0, "passed": True
        }
    },
    "files": {"notes-f16.gguf": {"sha256": "6" * 64, "size": 512}},
}  # fmt: skip


def validate(document: object) -> None:
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(document)


def read(document: object) -> Manifest:
    return manifest.read(json.dumps(document).encode(), "the manifest")


def changed(**values: Any) -> dict[str, Any]:
    return {**WRITTEN_BEFORE, **values}


def test_the_published_schema_is_that_of_the_type() -> None:
    assert SCHEMA.read_text() == manifest.schema(), "python -m oneround.manifest > docs/manifest.schema.json"
    jsonschema.Draft202012Validator.check_schema(json.loads(manifest.schema()))


def test_what_was_written_before_reads_and_is_written_again_byte_for_byte() -> None:
    """Digests and signatures of today's manifests hold for what a new coordinator makes of the same values."""
    before = json.dumps(WRITTEN_BEFORE, indent=2)
    document = json.loads(manifest.to_json(manifest.read(before.encode(), "it")))
    added = document.pop("read_back")
    assert added == {} and json.dumps(document, indent=2) == before
    validate(WRITTEN_BEFORE)


def test_the_first_manifests_are_still_read() -> None:
    first = read(FIRST)
    assert (first.job_name, first.version, first.job_id, first.energy_kept) == ("notes", 1, "", 1.0)
    assert (first.contributions[0].id, first.contributions[0].verdict, first.contributions[0].norm) == ("", "", None)
    assert first.verification["notes-f16.gguf"].perplexity is None and not first.started_from
    validate(FIRST)


def test_keys_of_a_later_version_are_passed_over_and_null_is_absent() -> None:
    later = changed(privacy={"epsilon": 3}, reason=None, job={**JOB, "dreams": [1, {"of": "sheep"}]})
    assert replace(read(later), job=JOB) == replace(read(WRITTEN_BEFORE), reason="")


@pytest.mark.parametrize(
    "document, sentence",
    [
        ([], "is not a JSON object"),
        ({}, "job is absent"),
        (changed(version=0), "version is 0; expected 1 to 2147483647"),
        (changed(version=True), "version is True; expected a whole number"),
        (changed(version=1.0), "version is 1.0; expected a whole number"),
        (changed(rank=10**30), "rank is .* expected a whole number"),
        (changed(rank=10**4000), "rank is an enormous number"),
        (changed(energy_kept=10**400), "energy_kept is an enormous number; expected a number"),
        (changed(job=[1]), r"job is \[1\]; expected an object"),
        (changed(job={"name": "../up"}), "its job has no name"),
        (changed(job={"name": "notes", "lora": {"rank": "many"}}), "job is no job"),
        (changed(job={"name": "notes", "later": json.loads("[" * 30 + "]" * 30)}), "nested more than 16 deep"),
        (changed(reason="a" * 100_000), "reason is 'aaa"),
        (changed(contributions={"0": 1}), "contributions is .* expected a list"),
        (changed(contributions=[1]), "contributions: number 0 is 1; expected an object"),
        (changed(contributions=[{"client": "x"}]), "contributions: number 0: digest is absent"),
        (changed(files={"a": {"sha256": "0" * 63, "size": 1}}), "files: a: sha256 is '0+'; expected 64 hex digits"),
        (changed(files={"a": {"sha256": "0" * 64, "size": -1}}), "files: a: size is -1; expected 0 or more"),
        (changed(files={"a\nb": {"sha256": "0" * 64, "size": 1}}), "files: a key is .* expected a name"),
        (changed(withheld={"x": 3}), "withheld: x is 3; expected a string"),
    ],
)
def test_what_is_no_manifest_is_told_by_its_place(document: object, sentence: str) -> None:
    with pytest.raises(BadData, match=sentence):
        read(document)


@pytest.mark.parametrize(
    "text, sentence",
    [
        (b"{", "is not a JSON file"),
        (b"\xff\xfe{", "is not a JSON file"),
        (b"[" * 100_000, "is not a JSON file"),
        (b'{"version": NaN}', "NaN is no number"),
        (b'{"version": 1' + b"0" * 5000 + b"}", "is not a JSON file"),
        (b'{"version": 1, "version": 2}', "the key 'version' is there twice"),
    ],
)
def test_what_is_not_json(text: bytes, sentence: str) -> None:
    with pytest.raises(BadData, match=sentence):
        manifest.read(text, "the manifest")


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = json.dumps(WRITTEN_BEFORE).encode()
    monkeypatch.setattr(manifest, "MOST_BYTES", len(text))
    (tmp_path / "manifest.json").write_bytes(text)
    assert manifest.open_file(tmp_path / "manifest.json") == read(WRITTEN_BEFORE)
    (tmp_path / "manifest.json").write_bytes(text + b" ")
    with pytest.raises(BadData, match="is larger than"):
        manifest.open_file(tmp_path / "manifest.json")
    with pytest.raises(BadData, match="is not there"):
        manifest.open_file(tmp_path / "none.json")
    with pytest.raises(BadData, match="cannot be read"):
        manifest.open_file(tmp_path)


def test_no_number_is_written_that_json_does_not_have() -> None:
    with pytest.raises(ValueError, match="JSON"):
        manifest.to_json(replace(read(WRITTEN_BEFORE), adapter_effect=float("nan")))


_TEXT = st.text(max_size=20)
_NAMES = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
_DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
_COUNTS, _FLOATS = st.integers(0, 2**40), st.floats(0, 1e30)
_CONTRIBUTIONS = st.builds(
    ContributionEntry,
    client=_TEXT,
    id=_TEXT,
    digest=_DIGESTS,
    num_examples=_COUNTS,
    weight=_FLOATS,
    verdict=_TEXT,
    reason=_TEXT,
    norm=_FLOATS,
    cosine=st.none() | st.floats(-1, 1),
)
_CHECKS = st.builds(
    FileCheck,
    measure=_TEXT,
    value=_FLOATS,
    bound=_FLOATS,
    top1_agreement=st.floats(0, 1),
    perplexity=st.none() | _FLOATS,
    passed=st.booleans(),
)
_MANIFESTS = st.builds(
    Manifest,
    job=st.just(JOB),
    version=st.integers(1, 2**31 - 1),
    reason=_TEXT,
    base_rounding=_FLOATS,
    rank=_COUNTS,
    started_from=st.builds(StartedFrom, job=_TEXT, version=st.integers(0, 100)),
    contributions=st.lists(_CONTRIBUTIONS, max_size=3).map(tuple),
    quantised=st.dictionaries(_NAMES, st.builds(QuantisedEntry, st.dictionaries(_NAMES, _COUNTS), st.just({}))),
    verification=st.dictionaries(_NAMES, _CHECKS, max_size=3),
    read_back=st.dictionaries(
        _NAMES, st.builds(ReadBack, modules=_COUNTS, largest_difference=_FLOATS, bound=_FLOATS), max_size=2
    ),
    withheld=st.dictionaries(_NAMES, _TEXT, max_size=2),
    files=st.dictionaries(_NAMES, st.builds(FileEntry, _DIGESTS, _COUNTS), max_size=3),
)


@given(_MANIFESTS)
def test_whatever_is_written_reads_back_the_same_and_fits_the_schema(document: Manifest) -> None:
    text = manifest.to_json(document)
    assert manifest.read(text, "it") == document
    validate(json.loads(text))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(WRITTEN_BEFORE)), _JSON)
def test_whatever_stands_under_a_key_is_read_or_told(key: str, value: object) -> None:
    """And where the reader takes it, so does the schema."""
    try:
        read(changed(**{key: value}))
    except BadData as error:
        assert str(error).startswith("the manifest")
        return
    if value is not None:  # the reader takes null for absent
        validate(changed(**{key: value}))


def test_a_schema_names_what_has_to_be_there() -> None:
    described = typed_json.schema(FileEntry, "a file", "what it is")
    assert described["required"] == ["sha256", "size"]
    assert described["properties"]["sha256"]["pattern"] == "^(?:[0-9a-f]{64})$"
