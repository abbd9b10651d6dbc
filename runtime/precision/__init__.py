"""Which precisions there are: the table, and a codec for each."""
