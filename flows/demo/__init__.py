"""The demo's models: right ones, and the same ones with a bug that people really write.

Each module is one training script. The modules are imported by audits' child processes (factories, losses and pickled
classes are found here), so importing them costs torch and `audits` alone: no MLflow, no Prefect, no scikit-learn.
"""
