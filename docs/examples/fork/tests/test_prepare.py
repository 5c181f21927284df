import kbitcheck


def test_prepare_keeps_the_specification():
    report = kbitcheck.check_implementation(
        "fork_prep:prepare", models=["tiny:gpt2"], quants=["nf4"], checkpointing=["non-reentrant"]
    )
    report.raise_for_failures()
