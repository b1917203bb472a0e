"""Tables for LaTeX: every character that it would take for a command is spelt out."""

from __future__ import annotations

from newsbert_ray.reporting.page import Page, Section, Table, Text, to_latex


def test_a_table_is_one_that_latex_takes() -> None:
    """A per cent sign comments the rest of its line out, an underscore stops the whole paper."""
    table = Table(
        ("student_layers", "accuracy %"),
        (("N & 1", "71.2 ± 0.3"), ("a\\b{}~^", "< 1")),
        words=1,
        caption="50 % of $5",
    )
    page = Page("Report", "lead", (Section("Results", (Text("no table"), table)),))
    assert to_latex(page).splitlines()[2:] == [
        r"\begin{table}",
        r"\centering",
        r"\caption{50 \% of \$5}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"student\_layers & accuracy \% \\",
        r"\midrule",
        r"N \& 1 & 71.2 $\pm$ 0.3 \\",
        r"a\textbackslash{}b\{\}\textasciitilde{}\textasciicircum{} & \textless{} 1 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
