"""Custom autograd.Functions, each judged by itself."""
