"""A recipe holds run defaults: metadata, retry policy, timeout. The run's own words come last.

python examples/04_recipe.py
"""

import koan_ray as koan


class Backup(koan.Job[str, str]):
    def execute(self, context, progress, cancellation) -> str:
        return f"{context} saved for {self.metadata['user_id']}"


if __name__ == "__main__":
    careful = (
        koan.Jobs.recipe()
        .with_defaults(metadata={"module": "Backups", "user_id": "nobody"})
        .use_policy(retry=koan.RetryPolicy(max_attempts=5), timeout=600)
        .build(Backup)
    )
    job = careful.start("photos").with_metadata(user_id="u1").named("nightly").run().get()
    print(job.wait().get())
    print(job.name, job.metadata)

    found = Backup.query(metadata={"module": "Backups"}).get()
    print(f"found {len(found)} by metadata: {found[0].name}")
