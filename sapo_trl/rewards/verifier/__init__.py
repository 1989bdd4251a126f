"""Worker processes that grade answers and can be killed."""
