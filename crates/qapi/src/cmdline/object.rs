//! `-object`: memory back ends, iothreads, random sources.

use std::path::PathBuf;

use spec::{MemoryBackend, MemoryKind};

use super::keyval::Opts;
use super::suggest::hint;
use super::{Builder, CmdlineError, Stop, Taken};

const TYPES: [&str; 7] = [
    "iothread",
    "memory-backend-file",
    "memory-backend-memfd",
    "memory-backend-ram",
    "rng-builtin",
    "rng-random",
    "secret",
];

impl Builder {
    pub(super) fn object(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, Some("qom-type"))?;
        let kind = o.required("qom-type")?;
        if matches!(kind.as_str(), "help" | "?") {
            return Err(Stop::Print(format!(
                "List of user creatable objects:\n  {}\n",
                TYPES.join("\n  ")
            )));
        }
        let id = o.id("id")?.ok_or_else(|| o.error("parameter 'id' is missing"))?;
        if self.object_ids.contains(&id) {
            return Err(o.error(format!("object '{id}' was given before")).into());
        }
        self.object_ids.push(id.clone());
        match kind.as_str() {
            "memory-backend-ram" | "memory-backend-memfd" | "memory-backend-file" => {
                self.memory_object(&mut o, &kind, id)?;
            }
            "iothread" => {
                for key in o.ignore(&["poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch"]) {
                    self.warn(format!("{option} iothread {key}= is ignored: it does not poll"));
                }
                self.machine.iothreads.push(id);
            }
            "rng-random" => {
                let file = o.str("filename").unwrap_or_else(|| "/dev/urandom".into());
                self.rngs.insert(id, PathBuf::from(file));
            }
            "rng-builtin" => {
                self.rngs.insert(id, PathBuf::from("/dev/urandom"));
            }
            "secret" => {
                o.ignore(&["data", "file", "format", "keyid", "iv", "qom-type"]);
                self.warn(format!("{option} secret,id={id} is ignored: nothing here uses secrets"));
            }
            other => {
                let near = hint(other, TYPES.into_iter(), "");
                return Err(o
                    .error(format!("object type '{other}' is not supported{near}"))
                    .into());
            }
        }
        Ok(o.finish()?)
    }

    fn memory_object(&mut self, o: &mut Opts, kind: &str, id: String) -> Result<(), CmdlineError> {
        let size = o.size("size", 1)?.filter(|s| *s > 0);
        let size = size.ok_or_else(|| o.error("parameter 'size' is missing or zero"))?;
        let huge = o.flag("hugetlb", false)?;
        let huge_size = o.size("hugetlbsize", 1)?.filter(|s| *s > 0);
        if huge_size.is_some_and(|s| !s.is_power_of_two()) {
            return Err(o.bad("hugetlbsize", "must be a power of two"));
        }
        let path = o.str("mem-path");
        let kind = match (kind, path) {
            ("memory-backend-file", Some(path)) => MemoryKind::File { path: path.into() },
            ("memory-backend-file", None) => {
                return Err(o.error("parameter 'mem-path' is missing"));
            }
            (_, Some(_)) => return Err(o.bad("mem-path", "belongs to memory-backend-file")),
            ("memory-backend-memfd", None) => {
                MemoryKind::Memfd { hugetlb: huge.then(|| huge_size.unwrap_or(2 << 20)) }
            }
            _ if huge || huge_size.is_some() => {
                return Err(o.bad("hugetlb", "belongs to memory-backend-memfd"));
            }
            _ => MemoryKind::Ram,
        };
        let memfd = matches!(kind, MemoryKind::Memfd { .. });
        let share = o.flag("share", memfd)?;
        let prealloc = o.flag("prealloc", false)?;
        // What these ask for is so, or changes nothing that a guest or user can see.
        o.ignore(&[
            "merge",
            "dump",
            "seal",
            "x-use-canonical-path-for-ramblock-id",
            "discard-data",
        ]);
        for key in o.ignore(&["prealloc-threads", "prealloc-context", "reserve", "align"]) {
            self.warn(format!("-object {key}= is ignored: it changes nothing here"));
        }
        if o.str("policy").is_some_and(|p| p != "default")
            || o.has("host-nodes.0")
            || o.has("host-nodes")
        {
            return Err(o.bad("policy", "binding memory to host nodes is not available"));
        }
        for key in ["pmem", "readonly", "rom"] {
            if o.bool(key).ok().flatten() == Some(true) {
                return Err(o.bad(key, "is not available"));
            }
        }
        self.machine.memory_backends.push(MemoryBackend { id, kind, size, share, prealloc });
        Ok(())
    }
}
