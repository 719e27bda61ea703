from evaluation.table import format_table


def test_tables_align_text_left_and_numbers_right():
    assert format_table(["model", "bits"], [["a", "1.5"], ["longer", "10.25"]]) == (
        "model    bits\n------  -----\na         1.5\nlonger  10.25"
    )
