"""Results: tables and the page. No test looks at a time."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from kvq.bench.report import __main__ as report
from kvq.bench.report import page


@pytest.mark.slow
def test_report_renders(measured, tmp_path):
    out = tmp_path / "performance.md"
    result = CliRunner().invoke(report.main, [str(measured[2]), "-o", str(out)])
    assert result.exit_code == 0, result.output
    text = out.read_text()
    assert "### 48 cached tokens" in text
    assert "| kvq-mixed |" in text
    assert "controller of the real size with untrained weights" in text
    assert "![ms per token against cached tokens](tiny.png)" in text
    assert (tmp_path / "tiny.png").is_file()


def test_report_compares_with_the_fastest_arm_of_each_peer():
    arms = {"kvq-int4": 2.0, "ort-gqa-fp32": 8.0, "ort-gqa-int8": 5.0, "llama-f16": 7.0}
    rest = dict.fromkeys(
        ("ms_p25", "ms_p75", "floor_ms", "over_floor", "gb_per_s", "prefill_tokens_per_s", "kv_bytes",
         "peak_rss_bytes", "check_difference"), 1.0,
    )  # fmt: skip
    rows = [{"arm": arm, "ms_per_token": ms, **rest} for arm, ms in arms.items()]
    assert page.step_table(rows)[2].startswith("| kvq-int4 | 2.00 | 1.00 - 1.00 | 2.50 | 3.50 |")
    for row in rows:  # the machine is half as fast in the second and third turn, and one arm slower still in the third
        ms = row["ms_per_token"]
        row["burst_ms"] = [ms, 2 * ms, (3 if row["arm"] == "llama-f16" else 2) * ms]
    assert page.step_table(rows)[2].startswith(
        "| kvq-int4 | 2.00 | 1.00 - 1.00 | 2.50 (2.50 - 2.50) | 3.50 (3.50 - 4.38) |"
    )


def test_report_compares_prefill_turn_by_turn():
    # The machine is half as fast in the second and third turn: each arm's median says little, its ratios all.
    seconds = {"kvq-int4": [1, 2, 2], "ort-gqa-fp32": [2, 4, 6], "ort-gqa-int8": [9, 9, 9], "llama-f16": [1, 2, 4]}
    rows = [
        {"arm": arm, "context": 12, "prefill_seconds": taken, "prefill_tokens_per_s": 12 / sorted(taken)[1]}
        for arm, taken in seconds.items()
    ]
    lines = page.prefill_table(rows)
    assert lines[2] == "| kvq-int4 | 6 (6 - 9) | 2.00 (2.00 - 2.50) | 1.00 (1.00 - 1.50) | 3 |"
    assert [line.split(" |")[0] for line in lines[3:]] == ["| llama-f16", "| ort-gqa-fp32", "| ort-gqa-int8"]
    for row in rows:
        del row["prefill_seconds"]  # as in files of before turns were kept
    assert page.prefill_table(rows)[2] == "| kvq-int4 | 6 | 2.00 | 1.00 | - |"


def test_report_leaves_out_what_a_newer_version_measured_again(monkeypatch, tmp_path):
    monkeypatch.setattr(page, "write_plot", lambda rows, file: None)
    monkeypatch.setattr(page, "step_table", lambda rows: [f"steps {rows[0]['run']['date']}"])
    monkeypatch.setattr(page, "prefill_table", lambda rows: [f"prompts {rows[0]['run']['date']}"])
    row = {"arm": "kvq-int8", "shape": "tiny", "threads": 2, "weight_bytes": 1e6, "bandwidth_gb_per_s": 1.0,
           "idle_cpu_share": 0.0, "backend": "", "settings": "", "check_reference": "", "versions": {}}  # fmt: skip
    about = {"cpu": "Some CPU", "cores": 2, "instructions": [], "memory_gb": 1, "system": "", "skipped": {}}

    def measured(version, date, *contexts):
        run = about | {"date": date, "versions": {"kvq": version}}
        return [row | {"context": context, "run": run} for context in contexts]

    old = ("old", measured("0.1.0", "2026-11-26", 12, 48, 96))
    text = page.page([old, ("new", measured("0.2.0", "2026-11-29", 12, 48))], tmp_path)
    new, older = (text.index(f"## tiny, 2 threads of Some CPU, kvq {version}") for version in ("0.2.0", "0.1.0"))
    assert new < older
    assert [text.count(f"### {context} cached tokens") for context in (12, 48, 96)] == [1, 1, 1]
    assert text.count("steps 2026-11-26") == 1
    assert "At 12 and 48 tokens a newer version was measured, above; these are in old.json." in text
    text = page.page([old, ("again", measured("0.1.0", "2026-11-29", 12))], tmp_path)  # of one version all is shown
    assert text.count("### 12 cached tokens") == 2


def test_report_refuses_other_files_in_one_line(tmp_path):
    file = tmp_path / "x.json"
    for content in ("{", "[]", '{"a": 1}', '[{"arm": "kvq-fp16"}]', '[{"run": {}}]'):
        file.write_text(content)
        result = CliRunner().invoke(report.main, [str(file), "-o", str(tmp_path / "out.md")])
        assert result.exit_code == 2, content
        assert len(result.output.strip().splitlines()) == 1
