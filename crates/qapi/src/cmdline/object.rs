//! `-object`: memory back ends, iothreads, random sources.

use std::path::PathBuf;

use spec::{MemoryBackend, MemoryKind};

use super::keys::Kind::{Id, List, Number, OneOf, Size, Switch, SwitchOrAuto, Text};
use super::keys::{Family, Key, Member, Schema, fixed, key, refused};
use super::keyval::Opts;
use super::{Builder, CmdlineError, Taken};

/// `-object`.
pub const OBJECTS: Family = Family {
    key: "qom-type",
    what: "object type",
    heading: "List of user creatable objects:",
    members: &[
        Member { schema: &IOTHREAD, aliases: &[], about: "thread of disks" },
        Member { schema: &MEMORY_FILE, aliases: &[], about: "RAM in a file" },
        Member {
            schema: &MEMORY_MEMFD,
            aliases: &[],
            about: "RAM that can be shared, on huge pages too",
        },
        Member { schema: &MEMORY_RAM, aliases: &[], about: "anonymous RAM" },
        Member { schema: &RNG_BUILTIN, aliases: &[], about: "random numbers of the host's kernel" },
        Member { schema: &RNG_RANDOM, aliases: &[], about: "random numbers from a file" },
        Member {
            schema: &SECRET,
            aliases: &[],
            about: "taken with a warning: nothing here uses secrets",
        },
    ],
    absent: &[],
    instead: "",
};

const EVERY: &[Key] = &[key("id", Id, "", "Name of the object; must be given")];

const NO_POLL: &str = "it does not poll";

const IOTHREAD: Schema = Schema {
    name: "iothread",
    implied: None,
    keys: &[
        EVERY,
        &[
            key("poll-max-ns", Number(0, u64::MAX), "", "Longest polling").ignored(NO_POLL),
            key("poll-grow", Number(0, u64::MAX), "", "Growth of polling").ignored(NO_POLL),
            key("poll-shrink", Number(0, u64::MAX), "", "Shrinking of polling").ignored(NO_POLL),
            key("aio-max-batch", Number(0, u64::MAX), "", "Requests at once").ignored(NO_POLL),
        ],
    ],
};

const NOTHING: &str = "it changes nothing here";
const TO_NODES: &str = "binding memory to host nodes is not available";

const MEMORY: &[Key] = &[
    key("size", Size(1), "", "Size of the memory, such as 512M; must be given"),
    key("prealloc", Switch, "off", "Allocate all of it at the start"),
    key("merge", Switch, "on", "Equal pages may be merged").quiet(),
    key("dump", Switch, "on", "Part of core dumps").quiet(),
    key("x-use-canonical-path-for-ramblock-id", Switch, "", "Name in QEMU's streams").quiet(),
    key("prealloc-threads", Number(1, u64::MAX), "", "Threads of prealloc").ignored(NOTHING),
    key("prealloc-context", Text, "", "Where these run").ignored(NOTHING),
    key("reserve", Switch, "", "Reserve swap space").ignored(NOTHING),
    key("policy", OneOf(&["default", "preferred", "bind", "interleave"]), "default", "NUMA policy")
        .only(&["default"], TO_NODES),
    Key { kind: List, ..refused("host-nodes", TO_NODES) },
];

const OF_FILE: &str = "belongs to memory-backend-file";
const OF_MEMFD: &str = "belongs to memory-backend-memfd";

const MEMORY_RAM: Schema = Schema {
    name: "memory-backend-ram",
    implied: None,
    keys: &[
        EVERY,
        MEMORY,
        &[
            key("share", Switch, "off", "Other processes can map it"),
            refused("mem-path", OF_FILE),
            refused("hugetlb", OF_MEMFD),
            refused("hugetlbsize", OF_MEMFD),
        ],
    ],
};

const MEMORY_MEMFD: Schema = Schema {
    name: "memory-backend-memfd",
    implied: None,
    keys: &[
        EVERY,
        MEMORY,
        &[
            key("share", Switch, "on", "Other processes can map it"),
            key("hugetlb", Switch, "off", "Use huge pages"),
            key("hugetlbsize", Size(1), "2M", "Size of these, such as 2M or 1G"),
            key("seal", Switch, "on", "It can neither grow nor shrink").quiet(),
            refused("mem-path", OF_FILE),
        ],
    ],
};

const MEMORY_FILE: Schema = Schema {
    name: "memory-backend-file",
    implied: None,
    keys: &[
        EVERY,
        MEMORY,
        &[
            key("share", Switch, "off", "What is written goes to the file"),
            key("mem-path", Text, "", "The file, or a directory for a nameless one; must be given"),
            key("discard-data", Switch, "off", "The file's data may be thrown away").quiet(),
            key("align", Size(1), "", "Alignment in the process").ignored(NOTHING),
            fixed("pmem", "off", "Persistent memory"),
            fixed("readonly", "off", "Open the file read-only"),
            key("rom", SwitchOrAuto, "auto", "The guest cannot write")
                .only(&["off", "auto"], "it is not available"),
            refused("hugetlb", OF_MEMFD),
            refused("hugetlbsize", OF_MEMFD),
        ],
    ],
};

const RNG_RANDOM: Schema = Schema {
    name: "rng-random",
    implied: None,
    keys: &[EVERY, &[key("filename", Text, "/dev/urandom", "Where the numbers are read")]],
};

const RNG_BUILTIN: Schema = Schema { name: "rng-builtin", implied: None, keys: &[EVERY] };

const SECRET: Schema = Schema {
    name: "secret",
    implied: None,
    keys: &[
        EVERY,
        &[
            key("data", Text, "", "The secret").quiet(),
            key("file", Text, "", "File that it is in").quiet(),
            key("format", OneOf(&["raw", "base64"]), "raw", "How it is written").quiet(),
            key("keyid", Text, "", "Secret that it is encrypted with").quiet(),
            key("iv", Text, "", "Initialization vector of that").quiet(),
        ],
    ],
};

impl Builder {
    pub(super) fn object(&mut self, option: &str, text: &str) -> Taken {
        let (mut o, schema) = self.member(option, text, &OBJECTS)?;
        let id = o.required("id")?;
        if self.object_ids.contains(&id) {
            return Err(o.error(format!("object '{id}' was given before")).into());
        }
        self.object_ids.push(id.clone());
        match schema.name {
            "iothread" => self.machine.iothreads.push(id),
            "rng-random" => {
                self.rngs.insert(id, PathBuf::from(o.or_default("filename")));
            }
            "rng-builtin" => {
                self.rngs.insert(id, PathBuf::from("/dev/urandom"));
            }
            "secret" => {
                self.warn(format!("{option} secret,id={id} is ignored: nothing here uses secrets"));
            }
            memory => {
                let backend = memory_backend(&mut o, memory, id)?;
                self.machine.memory_backends.push(backend);
            }
        }
        Ok(o.finish()?)
    }
}

fn memory_backend(o: &mut Opts, name: &str, id: String) -> Result<MemoryBackend, CmdlineError> {
    let size = o.size("size")?.filter(|s| *s > 0);
    let size = size.ok_or_else(|| o.error("parameter 'size' is missing or zero"))?;
    let kind = match name {
        "memory-backend-file" => MemoryKind::File { path: o.required("mem-path")?.into() },
        "memory-backend-memfd" => {
            let page = o.size("hugetlbsize")?.filter(|s| *s > 0);
            if page.is_some_and(|s| !s.is_power_of_two()) {
                return Err(o.bad("hugetlbsize", "must be a power of two"));
            }
            MemoryKind::Memfd { hugetlb: o.flag("hugetlb")?.then(|| page.unwrap_or(2 << 20)) }
        }
        _ => MemoryKind::Ram,
    };
    let (share, prealloc) = (o.flag("share")?, o.flag("prealloc")?);
    Ok(MemoryBackend { id, kind, size, share, prealloc })
}
