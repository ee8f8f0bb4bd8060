"""Everything that patches vLLM or NIXL, or works around them, and the versions it was checked with."""
