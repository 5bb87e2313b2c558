"""The stages, in the order of the data. Each is one function `(run, round) -> facts`; Ray lives here."""
