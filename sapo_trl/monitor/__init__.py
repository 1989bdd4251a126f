"""What watches a run while it trains: live view, files, the collapse guard."""
