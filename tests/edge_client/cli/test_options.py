"""Options that commands share: the same ones wherever they are taken, and back to the arguments that they came from."""

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client import backends
from edge_client.cli import app, options, service
from edge_client.cli.options import UNATTENDED, TrainingOptions, WatchOptions
from edge_client.cli.spread import as_arguments, spread
from edge_client.connection.target import Target
from edge_client.pausing.policy import When
from edge_client.training.recipe import Setup
from oneround.errors import BadData, UsageError

GROUPS = (Target, TrainingOptions, WatchOptions)
COMMANDS = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))  # what an argument can be

# Values of fields that have bounds of their own; the others have any of their type.
BOUNDED: dict[str, st.SearchStrategy[Any]] = {
    "save_every": st.floats(0, 1e9),
    "bits": st.integers(0, 64),
    "min_battery": st.floats(0, 90),
    "min_memory": st.floats(0, 50),
    "look_every": st.floats(1, 1e9),
}
TYPES: dict[Any, st.SearchStrategy[Any]] = {
    str: WORDS,
    bool: st.booleans(),
    Path: WORDS.map(Path),
    Path | None: st.none() | WORDS.map(Path),
    list[str]: st.lists(WORDS, min_size=1),
    list[When]: st.lists(st.sampled_from(When), min_size=1),
}


def instances(group: Any) -> st.SearchStrategy[Any]:
    hints = get_type_hints(group)
    names = [field.name for field in fields(group)]
    return st.builds(group, **{name: BOUNDED[name] if name in BOUNDED else TYPES[hints[name]] for name in names})


def parsed(command: Any, arguments: list[str]) -> dict[str, Any]:
    """The values that a command is called with."""
    return command.make_context("command", arguments).params  # type: ignore[no-any-return]


def taking(group: Any, **default: Any) -> Any:
    """A command that takes a group of options, perhaps with other defaults."""

    def run(chosen: Any) -> None: ...

    run.__annotations__ = {"chosen": group}
    run.__kwdefaults__ = run.__defaults__ = None
    if default:
        run.__defaults__ = (default["default"],)
    made = typer.Typer()
    made.command()(spread(run))
    return typer.main.get_command(made)


PLAIN = {group: taking(group) for group in GROUPS}
OTHER_DEFAULTS = taking(TrainingOptions, default=UNATTENDED)


@pytest.mark.parametrize("group", GROUPS)
@given(data=st.data())
def test_options_come_back_from_their_arguments(group: Any, data: st.DataObject) -> None:
    chosen = data.draw(instances(group))
    assert group(**parsed(PLAIN[group], as_arguments(chosen))) == chosen


@given(chosen=instances(TrainingOptions))
def test_whatever_the_commands_defaults_are(chosen: TrainingOptions) -> None:
    assert TrainingOptions(**parsed(OTHER_DEFAULTS, as_arguments(chosen))) == chosen


def test_defaults_are_a_commands_own() -> None:
    assert TrainingOptions(**parsed(PLAIN[TrainingOptions], [])) == TrainingOptions()
    assert TrainingOptions(**parsed(OTHER_DEFAULTS, [])) == UNATTENDED
    shared = {field.name for field in fields(TrainingOptions)}
    for name in ("join", "doctor"):
        values = parsed(COMMANDS[name], [])
        assert TrainingOptions(**{key: values[key] for key in shared}) == TrainingOptions(), name
    for name in ("stay", "install-service"):
        values = parsed(COMMANDS[name], ["--accept", "x"])
        assert TrainingOptions(**{key: values[key] for key in shared}) == UNATTENDED, name


def test_a_group_may_have_an_option_without_a_default() -> None:
    (accept,) = [parameter for parameter in PLAIN[WatchOptions].params if parameter.required]
    assert accept.opts == ["--accept"]


@settings(max_examples=30)
@given(
    watch=instances(WatchOptions),
    target=instances(Target),
    training=instances(TrainingOptions),
    state=WORDS.map(Path),
)
def test_the_service_runs_what_was_asked_for(
    watch: WatchOptions, target: Target, training: TrainingOptions, state: Path
) -> None:
    target = target.pinned_at("host:50051")
    line = service.command_line(watch, target, training, state)
    start = [sys.executable, "-P", "-m", "edge_client.cli", "stay", "--yes"]
    assert line[: len(start)] == start
    values = parsed(COMMANDS["stay"], line[len(start) - 1 :])
    for chosen in (watch, target, training.from_anywhere()):
        assert type(chosen)(**{field.name: values[field.name] for field in fields(chosen)}) == chosen
    assert values["state"] == state.absolute() and values["yes"]
    assert values["data"].is_absolute() and (values["model"] is None or values["model"].is_absolute())
    assert values["certificate"] is None or values["certificate"].is_absolute()


def test_the_service_forgets_no_option_of_stay() -> None:
    """Whatever `stay` takes is in one of the groups that go to the service, but for what is written by hand there."""
    groups = {field.name for group in GROUPS for field in fields(group)}
    taken = {parameter.name for parameter in COMMANDS["stay"].params}
    assert taken - groups == {"yes", "state", "as_json"}
    assert taken == {parameter.name for parameter in COMMANDS["install-service"].params}


INSTALLED_BEFORE = """stay --yes --server h:50051 --certificate /c.pem --certificate-key /k.pem --accept clinic-*
--accept b --when always --when idle --data /notes --backend torch --state /s --precision auto --bits 0 --min-battery 30
--min-memory 5 --model /m --name ward --skip-bad-rows --no-nice"""


def test_a_service_that_an_earlier_version_installed() -> None:
    values = parsed(COMMANDS["stay"], INSTALLED_BEFORE.split()[1:])
    assert values["accept"] == ["clinic-*", "b"] and values["when"] == [When.ALWAYS, When.IDLE]
    assert values["data"] == Path("/notes") and not values["nice"] and values["skip_bad_rows"]


# ---- what is made of them ----


def test_how_a_backend_trains() -> None:
    class Fast:
        def precision(self) -> str:
            return "bfloat16"

    fast: Any = Fast()
    assert TrainingOptions().setup(fast) == Setup("bfloat16")
    assert TrainingOptions(precision="float32", bits=4).setup(fast) == Setup("float32", 4)
    with pytest.raises(UsageError, match="no precision 'float8'"):
        TrainingOptions(precision="float8").setup(fast)
    with pytest.raises(UsageError, match="rounded to 3 bits"):
        TrainingOptions(bits=3).setup(fast)


def test_when_training_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    idle: list[bool] = []
    monkeypatch.setattr(options.sensors, "require_idle", lambda: idle.append(True))
    policy = replace(UNATTENDED, min_battery=50.0).pause_policy()
    assert policy.plugged_in and not policy.idle and policy.min_battery == 50 and not idle
    assert TrainingOptions(when=[When.IDLE]).pause_policy().idle and idle
    assert TrainingOptions().pause_policy() == TrainingOptions(when=[When.ALWAYS]).pause_policy()


def test_who_takes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Named:
        name = "torch"

        def precision(self) -> str:
            return "float32"

    monkeypatch.setattr(backends, "choose", lambda name: Named())
    chosen = TrainingOptions(tmp_path, "torch", tmp_path / "base", "ward", True, 7.0, bits=8)
    who = chosen.participant(tmp_path / "state", options.Screen())
    assert (who.state, who.name, who.data, who.model) == (tmp_path / "state", "ward", tmp_path, tmp_path / "base")
    assert (who.skip_bad_rows, who.save_every, who.setup) == (True, 7.0, Setup("float32", 8))
    assert TrainingOptions().participant(tmp_path, options.Screen()).name, "this machine's name"


def test_data_and_names_are_looked_at(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"there is no file or folder .*none") as error:
        TrainingOptions(data=tmp_path / "none").require_data()
    assert "--data" in error.value.hint
    TrainingOptions(data=tmp_path).require_data()
    WatchOptions(["clinic-*", "ward-[12]"]).require_names()
    with pytest.raises(UsageError, match="no job can have the name"):
        WatchOptions(["Clinic Notes"]).require_names()


def test_an_invitation_is_an_address() -> None:
    link = "oneround://host:50051/#x"
    assert options.invited(Target(), link).server == link
    assert options.invited(Target("host:1"), "") == Target("host:1")
    with pytest.raises(UsageError, match="says where the coordinator is"):
        options.invited(Target("host:1"), link)
