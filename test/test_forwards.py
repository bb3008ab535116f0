"""Forwards that pause at their blocks: the model's own values, whatever its code does between the blocks."""

from __future__ import annotations

import contextlib
import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from auto_round.calibration.block_io import Placement
from auto_round.calibration.forwards import BlockCall, Forwards, PausedForward, ReplayError, _Worker, pausing
from auto_round.calibration.native import NativeRun, run_native
from auto_round.calibration.pager import SMALL, Pager
from auto_round.compressors.chain import Chain, inputs_of
from auto_round.modeling.streaming import StreamedModel

SIZE, WORDS, LENGTH = 64, 50, 64  # a sample's hidden states are as large as what a pager puts away
BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]
PLAIN = contextlib.nullcontext


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x, mask=None, **rest):
        mixed = x if mask is None else mask @ x
        return x + torch.tanh(self.linear(mixed))


class Toy(nn.Module):
    """Embedding, blocks, head. Subclasses change `run`, which passes a hidden state through the blocks."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, SIZE)
        self.blocks = nn.ModuleList(blocks or [Block() for _ in BLOCKS])
        self.head = nn.Linear(SIZE, WORDS)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.begun = self.ended = 0

    def forward(self, input_ids):
        self.begun += 1
        try:
            return self.head(self.run(self.embed(input_ids)))
        finally:
            self.ended += 1

    def run(self, x):
        length = x.shape[1]
        mask = torch.ones(1, length, length).tril() / torch.arange(1, length + 1)[:, None]
        for block in self.blocks:
            x = block(x, mask=mask)
        return x


def ids(rows: int = 1, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def samples(count: int = 3, length: int = LENGTH) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids(1, length, seed)} for seed in range(1, count + 1)]


def native_of(model: nn.Module, blocks: list[str] = BLOCKS, amp: Any = PLAIN) -> NativeRun:
    return run_native(StreamedModel(model), blocks, {"input_ids": ids(2)}, amp)


def watched(model: nn.Module, batch: dict[str, torch.Tensor], blocks: list[str] = BLOCKS) -> list[tuple[str, Any, Any]]:
    """(block, hidden state that enters, output) of every call in a plain run."""
    seen, handles = [], []
    for name in blocks:

        def keep(module, args, output, name=name):
            seen.append((name, args[0].clone(), first(output).clone()))

        def before(module, args, name=name):
            entered.append(args[0].clone())

        handles.append(model.get_submodule(name).register_forward_pre_hook(before))
        handles.append(model.get_submodule(name).register_forward_hook(keep))
    entered: list[torch.Tensor] = []
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return [(name, x, out) for (name, _, out), x in zip(seen, entered, strict=True)]


def first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def follow(model: nn.Module, given: list[Any], folder: Path, keep: str = "memory", batch: int = 2) -> list[Any]:
    """Pass samples through the chain with unchanged blocks: (block, [hidden state], [wanted output]) at each place."""
    native = native_of(model)
    chain = Chain(model, native, given, Placement(torch.device("cpu"), keep, folder), PLAIN, batch)
    met = []
    try:
        while chain.place is not None:
            module = model.get_submodule(chain.place[0])
            chain.observe(module)
            chain.witness(module)
            io = chain.io()
            calls = [io.arguments([index]) for index in range(len(given))]
            hidden = [args[0].clone() for args, _ in calls]
            met.append((chain.place[0], hidden, [io.target([index]).clone() for index in range(len(given))]))
            chain.advance(module)
    finally:
        chain.close()
    return met


def check_followed(model: nn.Module, given: list[Any], folder: Path, **options: Any) -> list[Any]:
    """What the chain meets is what plain runs of each sample meet."""
    expected = [watched(model, sample) for sample in given]
    met = follow(model, given, folder, **options)
    assert [name for name, _, _ in met] == [name for name, _, _ in expected[0]]
    for place, (_, hidden, targets) in enumerate(met):
        for index in range(len(given)):
            torch.testing.assert_close(hidden[index], expected[index][place][1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(targets[index], expected[index][place][2], rtol=1e-4, atol=1e-5)
    return met


# ---- one forward -------------------------------------------------------------------------------------------------


def step_through(model: nn.Module, forward: PausedForward) -> list[tuple[str, int]]:
    places, call = [], forward.start()
    while call is not None:
        places.append(call.place)
        with torch.no_grad():
            output = model.get_submodule(call.block)(*call.args, **call.kwargs)
        call = forward.resume(output)
    return places


def test_a_paused_forward_gives_the_models_own_logits():
    model, batch = Toy(), {"input_ids": ids(2)}
    with torch.no_grad():
        expected = model(**batch)
    with pausing(model, BLOCKS):
        forward = PausedForward(model, batch, PLAIN)
        assert step_through(model, forward) == [(name, 0) for name in BLOCKS]
        assert torch.equal(forward.output, expected) and forward.call is None
        with torch.no_grad():
            assert torch.equal(model(**batch), expected)  # called otherwise, it runs as ever
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_whatever_is_given_as_a_blocks_output_counts():
    model, batch = Toy(), {"input_ids": ids(1)}
    with pausing(model, BLOCKS):
        forward = PausedForward(model, batch, PLAIN)
        call = forward.start()
        while call is not None:
            call = forward.resume(torch.zeros_like(call.args[0]))
    with torch.no_grad():
        assert torch.equal(forward.output, model.head(torch.zeros(1, LENGTH, SIZE)))


def test_places_in_a_call_have_names():
    tensor = torch.zeros(1)
    call = BlockCall("b", 0, (tensor, 3), {"mask": tensor, "rotary": (tensor, tensor)})
    assert [call.argument_name(i) for i in range(len(call.leaves))] == ["0", "1", "mask", "rotary[0]", "rotary[1]"]
    assert len(call.tensors) == 4 and call.argument_name(9) == "#9"


def test_grad_mode_and_autocast_are_the_callers_again():
    inside = []

    class Noting(Toy):
        def run(self, x):
            for block in self.blocks:
                inside.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
                x = block(x)
            return x

    model = Noting()

    def amp():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    with torch.enable_grad(), pausing(model, BLOCKS):
        forward = PausedForward(model, {"input_ids": ids()}, amp)
        call = forward.start()
        while call is not None:
            assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
            call = forward.resume(call.args[0])
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert inside == [(False, True)] * len(BLOCKS)


def test_grad_mode_of_the_model_stays_its_own():
    class Guarded(Toy):
        def run(self, x):
            with torch.no_grad():
                return super().run(x)

    check_contexts(Guarded())


def test_autocast_of_the_model_stays_its_own():
    class Guarded(Toy):
        def run(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().run(x)

    check_contexts(Guarded())


def check_contexts(model: nn.Module) -> None:
    """What the model's code enters around its blocks holds for its own code alone, also with two forwards at once."""
    one, two = (PausedForward(model, {"input_ids": ids()}, PLAIN) for _ in range(2))
    modes = []
    with torch.enable_grad(), pausing(model, BLOCKS), contextlib.closing(one), contextlib.closing(two):
        calls = [one.start(), two.start()]
        while calls[0] is not None:
            modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            calls = [f.resume(call.args[0]) for f, call in zip((one, two), calls, strict=True)]
        modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
    torch.set_autocast_enabled("cpu", False)  # for the tests that follow
    assert set(modes) == {(True, False)}


@pytest.fixture(autouse=True)
def before():
    """Forwards that tests run earlier in this process left waiting are not this one's."""
    gc.collect()
    _before[:] = [thing for thing in gc.get_objects() if type(thing) is _Worker]


_before: list[_Worker] = []


def live_workers() -> int:
    gc.collect()
    workers = [thing for thing in gc.get_objects() if type(thing) is _Worker and not thing.dead]
    return sum(not any(worker is old for old in _before) for worker in workers)


def test_closing_ends_a_waiting_forward():
    model = Toy()
    with pausing(model, BLOCKS):
        forward = PausedForward(model, {"input_ids": ids()}, PLAIN)
        forward.start()
        assert (model.begun, model.ended) == (1, 0)
        forward.close()
        forward.close()
    assert (model.begun, model.ended) == (1, 1) and forward.call is None and not live_workers()


def test_nothing_waits_after_an_exception():
    class Failing(Block):
        def forward(self, x, **rest):
            raise ValueError("no such luck")

    model = Toy(Block(), Failing(), Block())
    with pytest.raises(ValueError, match="no such luck"):
        native_of(model)
    assert model.begun == model.ended == 2
    assert not live_workers() and all("forward" not in module.__dict__ for module in model.modules())


def test_an_error_between_blocks_reaches_the_caller():
    class Broken(Toy):
        def run(self, x):
            x = self.blocks[0](x)
            raise KeyError("between")

    model = Broken()
    with pausing(model, BLOCKS):
        forward = PausedForward(model, {"input_ids": ids()}, PLAIN)
        call = forward.start()
        with pytest.raises(KeyError, match="between"):
            forward.resume(call.args[0])
    assert model.ended == 1 and not live_workers()


# ---- several samples ---------------------------------------------------------------------------------------------


def test_samples_side_by_side_equal_single_runs(tmp_path):
    met = check_followed(Toy(), samples(5), tmp_path)
    assert len(met) == 3


def test_equal_tensors_are_stored_once():
    model = Toy()
    with pausing(model, BLOCKS):
        forwards = Forwards(model, samples(3), PLAIN)
        try:
            masks = [forwards.call(index).kwargs["mask"] for index in range(3)]
            hidden = [forwards.call(index).args[0] for index in range(3)]
            assert len({mask.data_ptr() for mask in masks}) == 1
            assert len({x.data_ptr() for x in hidden}) == 3
            assert forwards.place == ("blocks.0", 0) and len(forwards) == 3
        finally:
            forwards.close()
    assert not live_workers() and model.begun == model.ended == 3


class Shifting(Toy):
    """Changes a tensor that all samples share between its blocks."""

    def run(self, x):
        scale = torch.ones(SIZE)
        for block in self.blocks:
            x = block(x * scale, scale=scale)
            scale.mul_(0.5)
        return x


def test_a_shared_tensor_that_the_model_changes_is_noticed():
    model = Shifting()
    with pausing(model, BLOCKS):
        forwards = Forwards(model, samples(2), PLAIN)
        forwards.check_shared()
        for index in range(2):
            forwards.resume(index, forwards.call(index).args[0])
        with pytest.raises(ReplayError, match="changes a tensor of shape"):
            forwards.check_shared()
        forwards.close()
    assert not live_workers()


def test_the_chain_names_a_shared_tensor_that_changed(tmp_path):
    with pytest.raises(ReplayError, match="changes a tensor of shape"):
        follow(Shifting(), samples(), tmp_path)


def test_the_chain_refuses_shared_tensors_that_change(tmp_path):
    with pytest.raises(ReplayError):
        follow(Shifting(), samples(), tmp_path)
    assert not live_workers() and not list(tmp_path.iterdir())


def test_samples_that_take_different_ways():
    class Choosing(Toy):
        def run(self, x):
            return self.blocks[0](x) if x.shape[1] > 20 else self.blocks[1](x)

    model = Choosing()
    with pausing(model, BLOCKS):
        forwards = Forwards(model, [*samples(1), *samples(1, length=16)], PLAIN)
        with pytest.raises(ReplayError, match=r"one is at blocks\.0, another at blocks\.1"):
            forwards.place  # noqa: B018
        forwards.close()
    assert not live_workers()


def test_samples_of_different_lengths(tmp_path):
    given = [*samples(2), *samples(2, length=40), *samples(1, length=24)]
    model = Toy()
    check_followed(model, given, tmp_path)
    native = native_of(model)
    chain = Chain(model, native, given, Placement(torch.device("cpu"), "memory", tmp_path), PLAIN, 4)
    try:
        chain.observe(model.blocks[0])
        parts = chain.io().split(range(len(given)), 4)
        assert parts == [[0, 1], [2, 3], [4]]
        assert [chain.io().arguments(part)[0][0].shape[:2] for part in parts] == [(2, 64), (2, 40), (1, 24)]
    finally:
        chain.close()


def test_batches_that_cannot_be_joined(tmp_path):
    class OverRows(Block):
        def forward(self, x, **rest):
            return x + self.linear(x - x.mean(0, keepdim=True) + x.std())

    model = Toy(Block(), OverRows(), Block())
    native = native_of(model)
    assert [native.joints[name, 0].joins for name in BLOCKS[:2]] == [True, False]
    assert "a batch differs by" in native.joints["blocks.1", 0].reason
    check_followed(model, samples(4), tmp_path)


def test_an_argument_that_depends_on_the_batch(tmp_path):
    class Scaled(Toy):
        def run(self, x):
            scale = x.std() * torch.ones(SIZE)
            for block in self.blocks:
                x = block(x * scale, scale=scale)
            return x

    native = native_of(Scaled())
    assert native.joints["blocks.0", 0].reason == "argument scale depends on the batch without growing with it"
    check_followed(Scaled(), samples(3), tmp_path)


# ---- what blocks and models do -----------------------------------------------------------------------------------


def test_a_state_that_blocks_fill_and_read(tmp_path):
    class Keeper(Block):
        def forward(self, x, state):
            x = super().forward(x) + sum(state.values(), torch.zeros(()))
            state[len(state)] = x.mean(-1, keepdim=True)
            return x

    class Handing(Toy):
        def run(self, x):
            state = {}
            for block in self.blocks:
                x = block(x, state)
            return x + state[1]

    model = Handing(Keeper(), Keeper(), Keeper())
    expected = watched(model, {"input_ids": ids(2)})
    native = native_of(model)
    assert [place for place, _ in native.places] == [name for name, _, _ in expected]
    with torch.no_grad():
        torch.testing.assert_close(native.logits, model(ids(2)))
    check_followed(model, samples(3), tmp_path)


def test_blocks_that_are_called_several_times(tmp_path):
    class Looped(Toy):
        def run(self, x):
            for _ in range(2):
                for block in self.blocks:
                    x = block(x)
            return self.blocks[0](x)

    native = native_of(Looped())
    assert native.places == [(name, turn) for turn in range(2) for name in BLOCKS] + [("blocks.0", 2)]
    assert native.blocks == tuple(BLOCKS)
    assert len(check_followed(Looped(), samples(3), tmp_path)) == 7


def test_an_encoder_and_a_decoder(tmp_path):
    class Attending(Block):
        def forward(self, x, encoded=None):
            return super().forward(x) if encoded is None else super().forward(x) + encoded.mean(1, keepdim=True)

    class Pair(Toy):
        def run(self, x):
            encoded = self.blocks[2](x)
            x = x.flip(1)
            for block in self.blocks[:2]:
                x = block(x, encoded=encoded)
            return x

    model = Pair(*(Attending() for _ in BLOCKS))
    assert native_of(model).blocks == ("blocks.2", "blocks.0", "blocks.1")
    check_followed(model, samples(3), tmp_path)


def test_other_inputs_and_outputs_for_each_block(tmp_path):
    class Pairs(Block):
        def forward(self, x, extra, number):
            return super().forward(x) + extra * number, extra + 1, None

    class PerLayer(Toy):
        def run(self, x):
            extra = torch.zeros(x.shape[0], x.shape[1], 1)
            for number, block in enumerate(self.blocks):
                x, extra, _ = block(x, extra, number)
            return x * extra

    check_followed(PerLayer(*(Pairs() for _ in BLOCKS)), samples(4), tmp_path)


def test_a_block_that_writes_into_its_arguments(tmp_path):
    class Writing(Block):
        def forward(self, x, **rest):
            return x.add_(torch.tanh(self.linear(x)))

    model = Toy(Block(), Writing(), Block())
    native = native_of(model)
    assert [joint.changes for joint in native.joints.values()] == [False, True, False]
    with torch.no_grad():
        torch.testing.assert_close(native.logits, model(ids(2)))
    check_followed(model, samples(3), tmp_path)


def test_a_block_that_keeps_state_is_refused():
    class Counting(Block):
        calls = 0

        def forward(self, x, **rest):
            self.calls += 1
            return super().forward(x) * self.calls

    with pytest.raises(ReplayError, match=r"replaying blocks\.1 gives an output .* keeps state between calls"):
        native_of(Toy(Block(), Counting(), Block()))
    assert not live_workers()


def test_a_model_that_keeps_a_sample_in_its_modules_is_refused(tmp_path):
    class Leaky(Block):
        kept = None

        def forward(self, x, **rest):
            return super().forward(x) + (0 if self.other is None else 5 * self.other.kept)

    class Leaving(Toy):
        def run(self, x):
            for block in self.blocks:
                block.kept = x.mean(1, keepdim=True)  # of whichever sample ran last
                x = block(x)
            return x

    blocks = [Leaky() for _ in BLOCKS]
    for block, other in zip(blocks, [None, *blocks], strict=False):
        object.__setattr__(block, "other", other)
    with pytest.raises(ReplayError, match="keeps"):
        follow(Leaving(*blocks), samples(), tmp_path)
    assert not live_workers()


def test_a_way_that_depends_on_the_number_of_rows():
    class Batchwise(Toy):
        def run(self, x):
            return self.blocks[0](x) if x.shape[0] > 1 else self.blocks[1](x)

    with pytest.raises(ReplayError, match="the model's way depends on data"):
        native_of(Batchwise())


def test_blocks_that_are_never_called(tmp_path):
    class Skipping(Toy):
        def run(self, x):
            return self.blocks[2](self.blocks[0](x))

    assert native_of(Skipping()).blocks == ("blocks.0", "blocks.2")
    check_followed(Skipping(), samples(2), tmp_path)


# ---- in a file ---------------------------------------------------------------------------------------------------


class Busy(Toy):
    """Holds hidden states over several blocks, and changes one of them in place."""

    def run(self, x):
        skip = x.clone()
        for number, block in enumerate(self.blocks):
            x = block(x, skip=skip)
            if number == 1:
                skip.mul_(2.0)
            skip = skip if number else skip + x
        return x + skip


def test_a_file_gives_the_same_bits(tmp_path):
    in_memory, in_file = tmp_path / "memory", tmp_path / "file"
    in_memory.mkdir()
    in_file.mkdir()
    given = [*samples(3), *samples(2, length=80)]
    plain = check_followed(Busy(), given, in_memory)
    paged = follow(Busy(), given, in_file, keep="file")
    assert [name for name, _, _ in plain] == [name for name, _, _ in paged]
    for (_, hidden, targets), (_, hidden_too, targets_too) in zip(plain, paged, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(hidden + targets, hidden_too + targets_too, strict=True))
    assert not list(in_file.iterdir()) and not list(in_memory.iterdir())


def test_waiting_samples_are_empty_and_files_removed(tmp_path):
    model = Busy()
    native = native_of(model)
    chain = Chain(model, native, samples(4), Placement(torch.device("cpu"), "file", tmp_path), PLAIN, 2)
    held = [chain.clean.call(index).args[0].untyped_storage().nbytes() for index in range(3)]
    assert held == [0, 0, 0] and not list(tmp_path.iterdir())  # the files have no names any more
    assert chain.clean.leaves(0)[0].shape == (1, LENGTH, SIZE)  # read back, without filling the tensor
    assert chain.clean.call(0).args[0].untyped_storage().nbytes() == 0
    chain.observe(model.blocks[0])
    chain.close()
    assert not list(tmp_path.iterdir()) and not live_workers()


def test_samples_that_ran_alone_are_put_away_again(tmp_path):
    """Long samples run one by one: memory holds one of them, not all that had their turn."""
    model = Busy()
    chain = Chain(model, native_of(model), samples(4), Placement(torch.device("cpu"), "file", tmp_path), PLAIN, 1)
    chain.micro.size = 1
    with contextlib.closing(chain):
        for block in model.blocks:
            chain.observe(block)
            chain.witness(block)
            held = [chain.clean.call(index).args[0].untyped_storage().nbytes() for index in range(4)]
            assert held == [0, 0, 0, 0]
            chain.advance(block)


class OnHost(Placement):
    """As for an accelerator whose samples wait in the host's memory: tensors are copied and emptied."""

    def pager(self, name: str) -> Pager:
        return Pager(None)


def test_samples_that_wait_on_the_host(tmp_path, monkeypatch):
    given = [*samples(3), *samples(2, length=80)]
    plain = follow(Busy(), given, tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "Placement", OnHost)
    hosted = follow(Busy(), given, tmp_path)
    for (_, hidden, targets), (_, hidden_too, targets_too) in zip(plain, hosted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(hidden + targets, hidden_too + targets_too, strict=True))


def test_the_check_row_is_no_sample(tmp_path):
    model = Toy()
    chain = Chain(model, native_of(model), samples(2), Placement(torch.device("cpu"), "memory", tmp_path), PLAIN, 2)
    with contextlib.closing(chain), inputs_of({"linear": model.blocks[0].linear}) as seen:
        chain.observe(model.blocks[0])
    assert seen["linear"].tokens == 2 * LENGTH


def test_files_are_removed_after_an_error(tmp_path):
    class Failing(Block):
        broken = False

        def forward(self, x, **rest):
            if self.broken:
                raise ValueError("later")
            return super().forward(x)

    model = Toy(Block(), Failing(), Block())
    native = native_of(model)
    chain = Chain(model, native, samples(3), Placement(torch.device("cpu"), "file", tmp_path), PLAIN, 2)
    model.blocks[1].broken = True
    with contextlib.closing(chain), pytest.raises(ValueError, match="later"):
        chain.observe(model.blocks[0])
        chain.witness(model.blocks[0])
        chain.advance(model.blocks[0])
        chain.observe(model.blocks[1])
    assert not list(tmp_path.iterdir()) and not live_workers() and model.begun == model.ended


def big(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(SMALL // 4, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).repeat(4 // dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["pages", None])
def test_pages_come_back_as_they_were(tmp_path, dtype, name):
    pager = Pager(name and tmp_path / name)
    tensor = big(dtype=dtype)
    expected = tensor.clone()
    pager.evict(0, [tensor])
    assert tensor.untyped_storage().nbytes() == 0
    assert torch.equal(pager.read(tensor), expected) and tensor.untyped_storage().nbytes() == 0
    pager.restore(0)
    assert torch.equal(tensor, expected)
    tensor.add_(1)
    pager.evict(0, [])
    pager.restore(0)
    assert torch.equal(tensor, expected + 1)
    assert pager.read(tensor) is tensor and pager.read("word") == "word"
    pager.close()
    pager.close()
    assert not (tmp_path / "pages").exists()


def test_views_and_small_tensors_stay(tmp_path):
    pager = Pager(tmp_path / "pages")
    base, small = torch.randn(2, SMALL), torch.randn(4)
    view, turned = base[1], torch.randn(SMALL // 8, 8).t()
    pager.evict(0, [view, small, turned])
    assert all(tensor.untyped_storage().nbytes() for tensor in (view, small, turned))
    pager.close()


def test_a_freed_place_is_used_again(tmp_path):
    pager = Pager(tmp_path / "pages")
    for seed in range(20):
        tensor = big(seed)
        pager.evict(0, [tensor])
        del tensor
    assert pager._end <= 3 * SMALL
    pager.close()


def test_a_shared_tensor_stays_in_memory(tmp_path):
    pager = Pager(tmp_path / "pages")
    tensor = big()
    pager.evict(0, [tensor])
    pager.restore(0)
    pager.forget(tensor)
    pager.evict(0, [])
    assert tensor.untyped_storage().nbytes()
    pager.close()


# ---- the tables of exceptions --------------------------------------------------------------------------------------


def test_arguments_that_a_table_calls_shared_are_not_joined(monkeypatch):
    from auto_round import special_model_handler

    monkeypatch.setitem(special_model_handler.SPECIAL_SHARED_CACHE_KEYS, "Toy", ("0",))
    native = native_of(Toy())
    assert all(joint.arguments[0] is None for joint in native.joints.values())


def test_types_of_limited_batches_run_one_by_one(monkeypatch):
    from auto_round import special_model_handler

    monkeypatch.setattr(special_model_handler, "mllms_with_limited_bs", ("llama",))
    monkeypatch.setattr(special_model_handler, "resolve_model_type", lambda model: "llama_next")
    native = native_of(Toy())
    assert not any(joint.joins for joint in native.joints.values())
    assert {joint.reason for joint in native.joints.values()} == {"its type is in mllms_with_limited_bs"}


def test_a_forward_that_takes_embeddings_only():
    """DeepSeek-VL2's code of its own: embeddings are prepared first, then the language model runs."""
    from types import SimpleNamespace

    from auto_round.special_model_handler import _handle_special_model

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block()])

        def forward(self, inputs_embeds):
            return SimpleNamespace(logits=self.layers[0](inputs_embeds))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(model_type="deepseek_vl_v2", architectures=None)
            self.embed, self.language = nn.Embedding(50, SIZE), Language()

        def prepare_inputs_embeds(self, input_ids, images=None):
            return self.embed(input_ids) + (0 if images is None else images)

        def forward(self, inputs_embeds=None):
            raise AssertionError("cannot be driven with token ids")

    model = _handle_special_model(Model())
    text = model(input_ids=torch.arange(6)[None]).logits
    pictured = model(input_ids=torch.arange(6)[None], images=torch.ones(1, 6, SIZE)).logits
    assert text.shape == pictured.shape and not torch.equal(text, pictured)


def test_layers_given_one_tensor_share_what_is_found_of_it():
    """Sums are those of each layer alone, also where the tensor changes between two layers or a layer gets no rows."""
    layers = {name: nn.Linear(8, 4, bias=False) for name in ("q", "k", "v", "empty")}
    torch.manual_seed(0)
    batches = [torch.randn(2, 5, 8) for _ in range(3)]
    with torch.no_grad(), inputs_of(layers) as seen:
        for x in batches:
            for name in ("q", "k"):
                layers[name](x)
            x.mul_(2)
            layers["v"](x)
            layers["empty"](x[:, :0])
    doubled = torch.cat(batches).reshape(-1, 8)
    assert set(seen) == {"q", "k", "v"} and all(one.tokens == 30 for one in seen.values())
    for name, x in {"q": doubled / 2, "k": doubled / 2, "v": doubled}.items():
        assert torch.allclose(seen[name].mean_square, x.double().square().mean(0))
        assert seen[name].largest == x.abs().max()
