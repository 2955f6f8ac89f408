"""Print the commands of a GitHub workflow or a GitLab job, one a line, as their runners run them."""

import sys

import yaml

with open(sys.argv[1]) as file:
    document = yaml.safe_load(file)
for step in (step for job in document.get("jobs", {}).values() for step in job["steps"]):
    if "run" in step:
        print(step["run"].strip())
for job in document.values():
    if isinstance(job, dict):
        print(*job.get("script", []), sep="\n", end="\n" if job.get("script") else "")
