"""What is wrong with an installation, a machine or a running cluster, and what a report of a defect needs."""
