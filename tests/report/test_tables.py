from dist_vlcl.report.tables import markdown_table


def test_text_of_a_run_stays_text_in_a_table():
    table = markdown_table(["name"], [["a|b"], ["![x](/etc/passwd)"], ["<b>*`\nc"]])
    assert table.splitlines()[2:] == ["| a\\|b |", "| ![x]\\(/etc/passwd) |", "| \\<b\\>\\*\\` c |"]
