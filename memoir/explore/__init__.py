"""One module per question that the exploring notebooks ask, and `figures`, which draws their answers."""
