"""What tests of jobs, stores and launchers need; no test framework is imported."""
