"""The benchmark over many adapters: its ids and limits by hand, what it refuses, its pictures, and that it runs."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from bench import many, many_decode, many_rivals, records, report  # noqa: E402
from bench.check import WrongResultError  # noqa: E402
from bench.many_cases import ADAPTERS, MIXED, Batch, Case, Pool, decode_cases, make_ids  # noqa: E402

CPU = torch.device("cpu")


def case(ids: str = "distinct", M: int = 5, ranks: tuple[int, ...] = (16,), part: str = "decode") -> Case:
    return Case(part, M, 64, 48, 8, ids, ranks, torch.float16)


def batch(of: Case) -> Batch:
    return Batch(of, Pool(of, CPU), CPU)


def test_ids_are_what_their_names_say():
    """Catches distinct ids that collide, a skew that is none, and a half base that is all or nothing."""
    assert sorted(make_ids("distinct", 64, 64).tolist()) == list(range(64))
    assert len(set(make_ids("identical", 64, 64).tolist())) == 1
    half = make_ids("half base", 64, 64).tolist()
    assert half.count(-1) == 32 and len(set(half)) == 33
    skewed, uniform = make_ids("skewed", 4096, 64), make_ids("uniform", 4096, 64)
    assert (skewed < 8).float().mean() == pytest.approx(0.5, abs=0.03)
    assert (uniform < 8).float().mean() == pytest.approx(0.125, abs=0.03)
    assert Counter(make_ids("sequences", 24, 3).tolist()) == {0: 8, 1: 8, 2: 8}


def test_the_grid_is_what_was_asked_for():
    """Catches a number of tokens or adapters, or the mixed ranks, that falls out of the measurement."""
    decode = decode_cases([(4096, 4096)], (1, 64), torch.bfloat16)
    assert {c.ids for c in decode if c.M == 64} == {"distinct", "uniform", "skewed", "identical", "half base"}
    assert [c.ids for c in decode if c.M == 1] == ["distinct"] * 2, "one token has one adapter, whatever the ids"
    assert {c.ranks for c in decode} == {(16,), MIXED}
    cases = many.cases_of(many.parse_arguments(["--parts", "train", "--tokens", "512"]), torch.bfloat16)
    assert [(c.M, c.slots) for c in cases] == [(512, n) for n in ADAPTERS]
    everything = many.cases_of(many.parse_arguments(["--full"]), torch.bfloat16)
    assert len({c.key for c in everything}) == len(everything)


def test_limit_by_hand():
    """Catches counting an adapter once a token, a rank that a slot has not, or the rows of the base alone."""
    distinct = batch(case("distinct", ranks=(8, 16)))
    ranks = sum(distinct.pool.ranks[s] for s in distinct.host_ids.tolist())
    assert distinct.pair_bytes == 2 * (ranks * (64 + 48) + 5 * (64 + 2 * 48))
    assert distinct.pair_flops == 2 * ranks * (64 + 48)
    assert batch(case("identical")).pair_bytes == 2 * (16 * (64 + 48) + 5 * (64 + 2 * 48))
    assert batch(case("half base")).pair_bytes == 2 * (2 * 16 * (64 + 48) + 2 * (64 + 2 * 48))


def test_truth_is_the_formula_row_by_row():
    """Catches rows that are given another's adapter, and gradients of another scaling."""
    of = batch(case("sequences", M=24, ranks=(8, 16), part="train"))
    for m in (0, 23):
        slot = int(of.host_ids[m])
        a, b, scale = of.factors(slot)
        x, dy, w = of.x[m].double(), of.dy[m].double(), of.weight.double()
        torch.testing.assert_close(of.truth["y"][m], x @ w.T + scale * (x @ a.T) @ b.T)
        torch.testing.assert_close(of.truth["dX"][m], dy @ w + scale * (dy @ b) @ a)
    wrong = of.truth["y"].clone()
    wrong[of.rows_of(0)] = of.truth["y"][of.rows_of(1)]
    with pytest.raises(WrongResultError, match="y: relative error"):
        of.check({"y": wrong})


def test_a_server_that_is_not_there_is_a_row_with_the_reason(monkeypatch, tmp_path):
    """Catches a benchmark that dies, or keeps quiet, without the servers' files."""
    monkeypatch.setattr("bench.rivals.FOLDER", tmp_path)
    found = many_rivals.servers()
    assert [server.make for server in found] == [None, None]
    assert all(".rivals/" in server.why_not for server in found)


class Rival:
    """A server's pair in plain PyTorch that, from a call on, raises or leaves the batch alone."""

    def __init__(self, right_calls: int, then: str) -> None:
        self.calls, self.right_calls, self.then = 0, right_calls, then

    def make(self, batch: Batch, y: torch.Tensor) -> many_rivals.Made:
        def pair() -> None:
            self.calls += 1
            if self.calls <= self.right_calls:
                y.copy_(batch.add_delta(y.double()))
            elif self.then == "raise":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return many_rivals.Made(pair, None, pair, graph=False)


def measured(rival: Rival, monkeypatch: pytest.MonkeyPatch, usable: bool) -> many.ManyBench:
    server = many_rivals.Server("vllm", "1", rival.make)
    monkeypatch.setattr(many_rivals, "servers", lambda: [server, many_rivals.Server("sglang", "1", rival.make)])
    monkeypatch.setattr(many.measure, "is_usable", lambda device: usable)
    bench = many.ManyBench(CPU, many.limits.Ceilings({"float16": 1e12}, 1e11), quick=True, smoke=True)
    bench.measure(case("distinct", ranks=(8,)))
    return bench


def named(bench: many.ManyBench, name: str) -> list[dict]:
    return [row for row in bench.rows if row["implementation"] == name]


@pytest.mark.parametrize("right_calls", [0, 4])  # the fourth is the last that is checked
def test_a_rival_that_takes_the_device_takes_nobodys_rows(right_calls, monkeypatch):
    """Catches peftkern's times lost to another's illegal address, when that one is checked or only when it is timed;
    a row that says ok and has no time; and silence about whose fault it was."""
    bench = measured(Rival(right_calls, "raise"), monkeypatch, usable=False)
    assert bench.lost.startswith("vllm (decode K64") and "illegal memory access" in bench.lost
    ours = named(bench, "peftkern")
    assert len(ours) == 3 and all(row["status"] == "ok" and row["us"] for row in ours)
    assert "failed" in {row["status"] for row in named(bench, "vllm")}
    assert not any(row["status"] == "ok" for row in named(bench, "vllm") + named(bench, "sglang"))
    environment = {"device": "none", "date": "never", "versions": {}}
    records.validate({"schema": 1, "kind": "many", "environment": environment, "rows": bench.rows, "missing": []})


def test_a_rival_that_fails_while_it_is_timed_is_left_out(monkeypatch):
    """Catches a failure of one that ends the timing of the rest."""
    bench = measured(Rival(8, "raise"), monkeypatch, usable=True)
    assert not bench.lost and all(row["us"] for row in named(bench, "peftkern"))
    failed = [row for row in bench.rows if row["status"] == "failed"]
    assert failed and all("timed: RuntimeError: CUDA error" in row["reason"] and row["us"] is None for row in failed)


def test_a_result_that_does_not_last_is_wrong(monkeypatch):
    """Catches a graph whose memory has become another's: right when it was recorded, and something else when timed."""
    bench = measured(Rival(4, "skip"), monkeypatch, usable=True)
    assert {row["status"] for row in named(bench, "peftkern")} == {"ok"}
    rows = named(bench, "vllm")
    assert {row["status"] for row in rows} == {"wrong"} and all(row["us"] is None for row in rows)
    assert all(row["reason"].startswith("after it was timed: y: relative error") for row in rows)


def made_up() -> dict:
    """A result that nobody measured, for tests only."""
    rows = []
    micros = dict.fromkeys(("median", "least", "p10", "p90"), 10.0) | {"samples": 3}
    for M in (1, 64):
        of = Case("decode", M, 4096, 4096, 64, "distinct", (16,), torch.bfloat16)
        for name, time in (("peftkern", 8.0), ("vllm", 20.0), ("sglang triton_v2", None)):
            row = many.row_of(of, "pair", name, "1") | {"reason": "no unpacked wheel"}
            if time is not None:
                row |= {"status": "ok", "reason": "", "us": micros | {"median": time}, "clock": "graph"}
                row |= {"limit_us": 2.0, "share_of_limit": 2.0 / time, "bytes": 100, "launches": 2}
            rows.append(row)
    of = Case("prefill", 512, 4096, 4096, 4, "sequences", (16,), torch.bfloat16)
    for name, time in (("frozen", 100.0), ("peftkern: cublas", 110.0), ("torch grouped_mm", 130.0)):
        row = many.row_of(of, "forward", name, "1") | {"status": "ok", "reason": "", "clock": "gpu"}
        rows.append(row | {"us": micros | {"median": time}, "overhead": records.overhead(time, 100.0)})
    environment = {"device": "none", "date": "never", "versions": {}, "peftkern_revision": None}
    return {"schema": 1, "kind": "many", "environment": environment, "rows": rows, "missing": []}


def test_report_of_a_result(tmp_path, capsys):
    """Catches a table that drops a rival or inverts a ratio, and a picture that cannot be drawn."""
    records.write(made_up(), tmp_path / "many.json")
    pytest.importorskip("matplotlib")
    assert report.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| 2.50 |" in text and "+10.0 %" in text and "sglang triton_v2 not run" in text
    assert (tmp_path / "many.png").stat().st_size > 10_000


def test_a_time_without_ok_is_refused():
    """Catches a row that was not measured and has a time, or was and has none."""
    result = made_up()
    result["rows"][0]["us"] = None
    with pytest.raises(ValueError, match="does not fit"):
        records.validate(result)


def test_tiles_that_are_tried_differ_from_the_table_and_fit():
    """Catches a search that leaves out the table's own tile, or splits K finer than a step."""
    table = many_decode.multi_decode_tile(arch=90, dtype=torch.bfloat16, M=64, N=4096, K=4096, R=16, aligned=True)
    shrink, expand = many_decode.candidates(table, 4096, 16)
    assert table in shrink and table in expand
    options = {"arch": 90, "dtype": torch.bfloat16, "N": 4096, "K": 4096, "aligned": True}
    for M in (1, 16, 64):  # ranks that differ are tried in blocks of their own in either launch
        mixed = many_decode.multi_decode_tile(M=M, R=64, **options)
        lists = many_decode.candidates(mixed, 4096, 64)
        assert all(mixed in tiles for tiles in lists)
        assert {t.block_r for t in lists[0]} == {16, 32} and {t.expand_r for t in lists[1]} == {16, 32, 64}
    assert all(tile.block_k * tile.split_k <= 4096 for tile in shrink)
    rows = [{"us": None}, {"us": {"median": 2.0}}, {"us": {"median": 1.0}}]
    assert many_decode.best_of(rows) is rows[2] and many_decode.best_of(rows[:1]) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="sizes for the interpreter")
def test_tiles_of_mixed_ranks_are_tried(tmp_path):
    """Catches a search whose rows do not say of which ranks they are, or whose tiles are wrong where ranks differ."""
    assert many.main(["--tune", "--smoke", "--ranks", "8", "40", "--out", str(tmp_path)]) == 0
    rows = records.read(tmp_path / "tune-many.json")["rows"]
    assert [row["problem"] for row in rows] == ["decode K64 N48 M3 distinct r8+40"]
    assert all(tried["reason"] == "" and tried["us"] for tried in rows[0]["candidates"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="sizes for the interpreter")
def test_the_program_runs_end_to_end(tmp_path, monkeypatch):
    """Catches a part that fails on the first GPU it meets; the servers' kernels are left out here."""
    monkeypatch.setattr("bench.rivals.FOLDER", tmp_path)
    assert many.main(["--smoke", "--out", str(tmp_path)]) == 0
    rows = records.read(tmp_path / "many.json")["rows"]
    assert {row["group"] for row in rows} == set(many.PARTS)
    for row in rows:
        if row["implementation"].startswith("peftkern"):
            assert row["status"] == "ok" and math.isfinite(row["us"]["median"]), row
            assert all(error < 0.01 for error in row["errors"].values()), row
