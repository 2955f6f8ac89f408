"""Move an alias of a registered model to a version, only when the gate lets this version through.

python promote.py models:/char-gpt@candidate production
"""

import json
import subprocess
import sys

from mlflow.tracking import MlflowClient

candidate, alias = sys.argv[1:]
gate = subprocess.run(["gradaudit", "gate", candidate, "--json"], stdout=subprocess.PIPE, text=True, check=False)
if gate.returncode != 0:
    print(f"{candidate} is not promoted: {json.loads(gate.stdout)['reason'] if gate.stdout else 'no verdict'}")
    sys.exit(gate.returncode)
# The verdict is about this version, whatever the candidate's alias names by now.
verdict = json.loads(gate.stdout)
MlflowClient().set_registered_model_alias(verdict["model"], alias, str(verdict["version"]))
print(f"{verdict['model']} v{verdict['version']} is @{alias} now")
