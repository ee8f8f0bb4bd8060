"""Everything that patches vLLM or works around it, and the versions it was checked against."""
