"""What is audited again, here or in a fresh process, before a failure stands."""
