"""The short form of `adapter_soak.py`: fewer adapters and seconds, the same checks."""

from adapter_soak import Settings, Zipf, soak
from random import Random


def test_zipf_draws_the_first_rank_most():
    rng, zipf = Random(1), Zipf(100, 1.0)
    draws = [zipf.draw(rng) for _ in range(20_000)]
    assert 0.17 < draws.count(0) / len(draws) < 0.22 and max(draws) < 100
    assert 1.6 < draws.count(0) / draws.count(1) < 2.4


def test_adapters_under_zipf_traffic_with_failing_sources():
    report = soak(Settings(adapters=600, seconds=20, host_adapters=64, device_adapters=16, disk_adapters=200, window_s=2.5))
    print(report)
    assert report["outcomes"]["served"] > 1000, report
    assert report["wrong_markers"] == 0, report["wrong"]
    assert report["unexpected"] == 0, report["unexpected_first"]
    assert report["source_requests"] > 100, "the disk was too large: nothing was fetched again"
    # Two seconds of noise on a busy machine are not a stall; the long form's bar is 1.1.
    assert report["p99_ratio"] is None or report["p99_ratio"] < 2 or report["inter_token"]["with_tarpit"]["p99_ms"] < 25, report[
        "inter_token"
    ]
    assert report["resident_mib"]["max"] - report["resident_mib"]["first"] < 576, report["resident_mib"]
    assert report["open_files"]["last"] < 400 and report["temporary_files"] == [] and report["shard_restarts"] == 0
