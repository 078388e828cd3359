"""Jobs from inside Ray tasks and actors. A task that waits for jobs gives its CPU back meanwhile.

python examples/08_inside_a_ray_task.py
"""

import ray

import koan_ray as koan


class Resize(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        return context // 2


@ray.remote
def album(pictures: list[int]) -> list[int]:
    jobs = Resize.start_many(pictures).run().get()
    return [job.wait().get() for job in jobs]


@ray.remote
class Shop:
    def order(self, picture: int) -> int:
        return Resize.start(picture).run().get().wait().get()


if __name__ == "__main__":
    koan.init()
    print(ray.get([album.remote([10, 20, 30]), album.remote([40])]))
    shop = Shop.remote()
    print(ray.get(shop.order.remote(100)))
