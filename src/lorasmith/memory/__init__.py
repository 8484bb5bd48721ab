"""What a run needs, what is free, and how to make the one fit the other. Never: records, run directories."""
