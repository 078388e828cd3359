"""Implementations of `koan_ray.ports.JobStore`, and what they share.

`memory` keeps jobs in this process, `mongo` in MongoDB; `embedded` starts a document server for the latter. `codec` tells
the shape of documents in those two, and `holders` names the processes that hold leases.

The rooms of the MongoDB store, each a small class that is given what it needs:

==================  ====================================================================================================
``mongo``           `MongoStore`: single reads, queries, counts, removal; hands the rest on to the rooms below
``mongo_database``  opening and closing, collections by partition, hints, limits of time
``mongo_driver``    the two drivers, and their errors in our words
``mongo_schema``    names of collections, and their indexes
``mongo_records``   documents as records, and the walk along an index
``mongo_writes``    guarded writes of jobs and executions
``mongo_leases``    leases of shards
``mongo_takeover``  stamping jobs with a new term, and reading what is open
``mongo_parts``     parts of long results, and the documents of users
``mongo_scan``      reading everything in a partition
``mongo_archive``   copying and deleting finished jobs
``mongo_blobs``     long contents outside of their documents, in GridFS
``mongo_filters``   queries as filters, sorts and indexes
``mongo_windows``   pages from a server that reads all that a filter lets through
==================  ====================================================================================================
"""
