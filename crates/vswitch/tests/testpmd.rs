//! DPDK's testpmd with virtio-user on both ends of the switch: frames from a pcap file go through the
//! switch into another, and have to be the same, each queue's in order.
//!
//! Needs Debian's `dpdk-dev` (dpdk-testpmd); without it the tests say so and pass.

#[path = "common/server.rs"]
mod server;

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use server::Switch;

const FRAMES: usize = 200;
/// What one run may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Frame `i` of queue `q`.
fn frame(q: usize, i: usize) -> Vec<u8> {
    let len = [60, 64, 65, 128, 1514, 4000, 9000, 97, 1500, 256][i % 10];
    let mut f = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, q as u8 + 1, 0x88, 0xb5];
    f.extend((14..len).map(|j| (j * 7 + i * 3 + q) as u8));
    f
}

fn write_pcap(path: &Path, q: usize) {
    let mut out = Vec::new();
    for word in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 65_535, 1] {
        out.extend(word.to_le_bytes());
    }
    for i in 0..FRAMES {
        let f = frame(q, i);
        for word in [0, 0, f.len() as u32, f.len() as u32] {
            out.extend(word.to_le_bytes());
        }
        out.extend(f);
    }
    std::fs::write(path, out).unwrap();
}

fn read_pcap(path: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    let mut rest = &bytes[24..];
    let mut frames = Vec::new();
    while rest.len() >= 16 {
        let len = u32::from_le_bytes(rest[8..12].try_into().unwrap()) as usize;
        frames.push(rest[16..16 + len].to_vec());
        rest = &rest[16 + len..];
    }
    frames
}

struct Case {
    packed: bool,
    mergeable: bool,
    queues: usize,
    /// The switch connects.
    client: bool,
}

fn run(case: &Case) {
    let Case { packed, mergeable, queues, client } = *case;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let mode = if client { "client" } else { "server" };
    let ports: Vec<String> = (0..2)
        .map(|i| {
            let socket = path(&format!("p{i}"));
            format!("p{i},type=vhost-user,path={socket},mode={mode},queues={queues}")
        })
        .collect();
    let switch = Switch::start(dir.path(), &ports);
    let (mut sources, mut sinks) = (String::new(), String::new());
    for q in 0..queues {
        write_pcap(&dir.path().join(format!("in{q}")), q);
        sources.push_str(&format!(",rx_pcap={}", path(&format!("in{q}"))));
        sinks.push_str(&format!(",tx_pcap={}", path(&format!("out{q}"))));
    }
    // With mergeable buffers a frame takes several small ones.
    let scatter = "port stop 1\nport config 1 rx_offload scatter on\nport start 1\n\
                   port config mtu 1 9000\n";
    let commands =
        format!("{}set portlist 2,0,1,3\nset fwd io retry\n", if mergeable { scatter } else { "" });
    std::fs::write(dir.path().join("cmds"), commands).unwrap();
    let nic = |i: usize| {
        format!(
            "net_virtio_user{i},path={},queues={queues},queue_size=1024,packed_vq={},mrg_rxbuf={},\
             server={}",
            path(&format!("p{i}")),
            u8::from(packed),
            u8::from(mergeable),
            u8::from(client)
        )
    };
    let mut command = Command::new("dpdk-testpmd");
    command
        .args(["--lcores", "0@0,1@0", "--no-huge", "-m", "512", "--no-pci"])
        .args(["--file-prefix", &format!("tern-{}-{packed}-{mergeable}", std::process::id())])
        .args(["--vdev", &nic(0), "--vdev", &nic(1)])
        .args(["--vdev", &format!("net_pcap2{sources}"), "--vdev", &format!("net_pcap3{sinks}")])
        .args(["--", "-i", "--nb-cores=1", "--txd=1024", "--rxd=1024", "--no-flush-rx"])
        .args([&format!("--rxq={queues}"), &format!("--txq={queues}")])
        .args(["--total-num-mbufs=12000", &format!("--cmdline-file={}", path("cmds"))]);
    if mergeable {
        command.args(["--mbuf-size=2304"]);
    } else {
        command.args(["--mbuf-size=10240", "--max-pkt-len=9018"]);
    }
    let log = std::fs::File::create(dir.path().join("log")).unwrap();
    command.stdin(Stdio::piped()).stdout(log.try_clone().unwrap()).stderr(log);
    let mut testpmd = Killed(command.spawn().unwrap());
    let deadline = Instant::now() + LIMIT;
    let mut stdin = testpmd.0.stdin.take().unwrap();
    // A queue that is not enabled yet would leave its frames to another.
    let log = || std::fs::read_to_string(dir.path().join("log")).unwrap();
    while !switch.has_rings(queues) {
        assert!(Instant::now() < deadline, "{:#}\n{}", switch.ask("show"), log());
        std::thread::sleep(Duration::from_millis(20));
    }
    stdin.write_all(b"start\n").unwrap();
    let all = queues * FRAMES;
    while switch.sent_to(1) < all {
        let ended = testpmd.0.try_wait().unwrap();
        let reset =
            switch.ask("stats")["ports"].as_array().unwrap().iter().any(|p| p["resets"] != 0);
        if ended.is_some() || reset || Instant::now() > deadline {
            let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
            panic!("{:#}\n{log}", switch.ask("stats"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    // What is in the ring is not yet in the files.
    loop {
        stdin.write_all(b"show port stats 3\n").unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
        if written(&log) == Some(all) {
            break;
        }
        assert!(Instant::now() < deadline, "{:#}\n{log}", switch.ask("stats"));
    }
    stdin.write_all(b"stop\nquit\n").unwrap();
    drop(stdin);
    testpmd.0.wait().unwrap();
    let shown = switch.ask("show");
    assert_eq!(shown["ports"][0]["rings"]["packed"], packed, "{shown:#}");
    for q in 0..queues {
        let got = read_pcap(&dir.path().join(format!("out{q}")));
        assert_eq!(got.len(), FRAMES, "queue {q}");
        for (i, f) in got.iter().enumerate() {
            assert!(
                *f == frame(q, i),
                "queue {q}, frame {i} of {} bytes is not what was sent",
                f.len()
            );
        }
    }
    let stats = switch.ask("stats");
    assert_eq!(stats["ports"][0]["rx-dropped"], 0, "{stats:#}");
    assert_eq!(stats["ports"][1]["tx-dropped"], 0, "{stats:#}");
}

/// Frames that testpmd, as it said last, has put into the files.
fn written(log: &str) -> Option<usize> {
    let last = log.rsplit("NIC statistics for port 3").next()?;
    last.split("TX-packets:").nth(1)?.split_whitespace().next()?.parse().ok()
}

fn matrix(packed: bool, mergeable: bool) {
    if !server::has_program("testpmd", "dpdk-testpmd", "dpdk-dev") {
        return;
    }
    // Both sides poll: two runs at a time would wait for each other's processors.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for (queues, client) in [(1, false), (1, true), (4, false), (4, true)] {
        run(&Case { packed, mergeable, queues, client });
    }
}

#[test]
fn split_rings() {
    matrix(false, false);
}

#[test]
fn split_rings_with_mergeable_buffers() {
    matrix(false, true);
}

#[test]
fn packed_rings() {
    matrix(true, false);
}

#[test]
fn packed_rings_with_mergeable_buffers() {
    matrix(true, true);
}
