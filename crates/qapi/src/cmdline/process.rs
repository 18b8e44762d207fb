//! Options about the process and the world around the VM: `-name`, `-uuid`, `-rtc`, `-incoming`,
//! logs, actions, and small ones that change little.

use spec::RtcBase;

use super::keys::Kind::{OneOf, Switch, Text};
use super::keys::{Schema, key};
use super::value;
use super::{Builder, Stop, Taken, invalid};

const NAME: Schema = Schema::of(
    Some("guest"),
    &[&[
        key("guest", Text, "", "Name of the VM, for monitors and the tern commands"),
        key("debug-threads", Switch, "off", "Threads have names; they always do").quiet(),
        key("process", Text, "", "Name of the process").ignored("the process keeps its name"),
    ]],
);

const RTC: Schema = Schema::of(
    Some("base"),
    &[&[
        key(
            "base",
            Text,
            "utc",
            "utc, localtime, or the date at the start, such as 2026-11-21T10:00:00",
        ),
        key("clock", OneOf(&["host", "rt", "vm"]), "host", "The clock that it goes by")
            .only(&["host"], "the others are not available"),
        key("driftfix", OneOf(&["none", "slew"]), "none", "Ticks that were missed come later")
            .ignored("the kernel keeps the timer's ticks"),
    ]],
);

const NO_DEVICE: &str = "there is no such device";

const ACTION: Schema = Schema::of(
    None,
    &[&[
        key("reboot", OneOf(&["reset", "shutdown"]), "reset", "What a reset by the guest does"),
        key("shutdown", OneOf(&["poweroff", "pause"]), "poweroff", "What power-off does"),
        key("panic", Text, "", "What a guest's panic does").ignored(NO_DEVICE),
        key("watchdog", Text, "", "What a watchdog does").ignored(NO_DEVICE),
    ]],
);

const KERNEL_BOOTS: &str = "the kernel given by -kernel is booted";

const BOOT: Schema = Schema::of(
    Some("order"),
    &[&[
        key("strict", Switch, "off", "Boot from nothing else").quiet(),
        key("order", Text, "", "Drives in the order of booting").ignored(KERNEL_BOOTS),
        key("once", Text, "", "The same, for the first boot").ignored(KERNEL_BOOTS),
        key("menu", Switch, "off", "Boot menu").ignored(KERNEL_BOOTS),
        key("splash", Text, "", "Picture").ignored(KERNEL_BOOTS),
        key("splash-time", Text, "", "How long it is shown").ignored(KERNEL_BOOTS),
        key("reboot-timeout", Text, "", "When to try again").ignored(KERNEL_BOOTS),
    ]],
);

const OVERCOMMIT: Schema = Schema::of(
    None,
    &[&[
        key("mem-lock", Switch, "off", "Lock all memory").ignored("it is not available"),
        key("cpu-pm", Switch, "off", "The guest halts the processor")
            .ignored("it is not available"),
    ]],
);

const MSG: Schema = Schema::of(
    None,
    &[&[
        key("timestamp", Switch, "", "Time in messages; the log decides").quiet(),
        key("guest-name", Switch, "", "The VM's name in messages").quiet(),
    ]],
);

const GLOBAL: Schema = Schema::of(
    None,
    &[&[
        key("driver", Text, "", "Which device"),
        key("property", Text, "", "Which property"),
        key("value", Text, "", "Its value"),
    ]],
);

/// `-global` values that say what is so anyway, or what a guest here cannot see.
const HARMLESS_GLOBALS: [&str; 5] = [
    "kvm-pit.lost_tick_policy",
    "ICH9-LPC.disable_s3",
    "ICH9-LPC.disable_s4",
    "PIIX4_PM.disable_s3",
    "PIIX4_PM.disable_s4",
];

/// What QEMU can log; here they are all one.
const LOG_ITEMS: [&str; 21] = [
    "all",
    "cpu",
    "cpu_reset",
    "exec",
    "fpu",
    "guest_errors",
    "in_asm",
    "int",
    "mmu",
    "nochain",
    "op",
    "op_ind",
    "op_opt",
    "op_plugin",
    "out_asm",
    "page",
    "pcall",
    "plugin",
    "strace",
    "unimp",
    "vpu",
];

impl Builder {
    pub(super) fn name(&mut self, option: &str, text: &str) -> Taken {
        let mut o = self.opts(option, text, &NAME)?;
        if let Some(name) = o.str("guest") {
            self.machine.name = Some(name);
        }
        Ok(o.finish()?)
    }

    pub(super) fn uuid(&mut self, option: &str, text: &str) -> Taken {
        self.machine.uuid = uuid::Uuid::try_parse(text).map_err(|_| {
            invalid(
                option,
                format!("'{text}' is not a UUID (01234567-89ab-cdef-0123-456789abcdef)"),
            )
        })?;
        Ok(())
    }

    pub(super) fn logfile(&mut self, _: &str, file: &str) -> Taken {
        self.machine.process.logfile = Some(file.into());
        Ok(())
    }

    pub(super) fn log_items(&mut self, option: &str, items: &str) -> Taken {
        for item in items.split(',').filter(|i| !i.is_empty()) {
            if matches!(item, "help" | "?") {
                return Err(Stop::Print(format!(
                    "Log items (comma separated), each of which logs all that there is:\n{}\n\
                     The environment variable TERN_LOG chooses more finely.\n",
                    LOG_ITEMS.join("\n")
                )));
            }
            if !LOG_ITEMS.contains(&item) && !item.starts_with("trace:") {
                let near = super::suggest::hint(item, LOG_ITEMS.into_iter(), "");
                return Err(invalid(option, format!("there is no log item '{item}'{near}")));
            }
            self.machine.process.log_items.push(item.into());
        }
        Ok(())
    }

    pub(super) fn incoming(&mut self, option: &str, uri: &str) -> Taken {
        let port =
            |rest: &str| rest.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let good = match uri.split_once(':') {
            Some(("tcp", rest)) if !port(rest) => {
                let why = "expected tcp:HOST:PORT with a port from 0 to 65535";
                return Err(invalid(option, format!("'{uri}': {why}")));
            }
            Some(("tcp", _)) => true,
            Some(("unix", path)) => !path.is_empty(),
            _ => uri == "defer",
        };
        if !good {
            return Err(invalid(
                option,
                format!("'{uri}' is not supported; use tcp:HOST:PORT, unix:PATH or defer"),
            ));
        }
        self.machine.process.incoming = Some(uri.into());
        Ok(())
    }

    pub(super) fn rtc(&mut self, option: &str, text: &str) -> Taken {
        let mut o = self.opts(option, text, &RTC)?;
        let base = o.or_default("base");
        self.machine.rtc = match base.as_str() {
            "utc" => RtcBase::Utc,
            "localtime" => RtcBase::Localtime,
            date => RtcBase::At(date_seconds(date).ok_or_else(|| {
                o.bad(
                    "base",
                    format!(
                        "expected utc, localtime or a date such as 2026-11-21T10:00:00, not '{date}'"
                    ),
                )
            })?),
        };
        Ok(o.finish()?)
    }

    pub(super) fn action(&mut self, option: &str, text: &str) -> Taken {
        let mut o = self.opts(option, text, &ACTION)?;
        if let Some(reboot) = o.str("reboot") {
            self.machine.actions.no_reboot = reboot == "shutdown";
        }
        if let Some(shutdown) = o.str("shutdown") {
            self.machine.actions.no_shutdown = shutdown == "pause";
        }
        Ok(o.finish()?)
    }

    pub(super) fn boot(&mut self, option: &str, text: &str) -> Taken {
        Ok(self.opts(option, text, &BOOT)?.finish()?)
    }

    pub(super) fn overcommit(&mut self, option: &str, text: &str) -> Taken {
        Ok(self.opts(option, text, &OVERCOMMIT)?.finish()?)
    }

    pub(super) fn msg(&mut self, option: &str, text: &str) -> Taken {
        Ok(self.opts(option, text, &MSG)?.finish()?)
    }

    pub(super) fn global(&mut self, option: &str, text: &str) -> Taken {
        let name = match text.split_once('=') {
            Some((name, _)) if name.contains('.') => name.to_string(),
            _ => {
                let mut o = self.opts(option, text, &GLOBAL)?;
                let name = format!("{}.{}", o.required("driver")?, o.required("property")?);
                o.required("value")?;
                o.finish()?;
                name
            }
        };
        if !HARMLESS_GLOBALS.contains(&name.as_str()) {
            let near = super::suggest::hint(&name, HARMLESS_GLOBALS.into_iter(), "");
            return Err(invalid(option, format!("property '{name}' is not supported{near}")));
        }
        self.warn(format!("{option} {name} is ignored: it changes nothing here"));
        Ok(())
    }

    pub(super) fn display(&mut self, option: &str, text: &str) -> Taken {
        match text {
            "none" => {
                self.headless = true;
                Ok(())
            }
            _ => Err(invalid(option, format!("'{text}' is not available; use -display none"))),
        }
    }

    pub(super) fn vga(&mut self, option: &str, text: &str) -> Taken {
        if text != "none" {
            self.warn(format!("{option} {text} is ignored: there is no display device"));
        }
        Ok(())
    }

    pub(super) fn balloon(&mut self, option: &str, text: &str) -> Taken {
        match text {
            "none" => Ok(()),
            _ => Err(invalid(option, "the balloon device is not available")),
        }
    }

    pub(super) fn parallel(&mut self, option: &str, text: &str) -> Taken {
        match text {
            "none" | "null" => Ok(()),
            _ => Err(invalid(option, "there is no parallel port; only 'none' is supported")),
        }
    }
}

/// Seconds since 1970 of "2026-11-21T10:00:00" or "2026-11-21", in UTC.
fn date_seconds(text: &str) -> Option<i64> {
    let (date, time) = text.split_once('T').unwrap_or((text, "0:0:0"));
    let numbers = |s: &str, by: char| -> Option<Vec<i64>> {
        s.split(by).map(|n| value::number(n).ok().and_then(|n| i64::try_from(n).ok())).collect()
    };
    let (date, time) = (numbers(date, '-')?, numbers(time, ':')?);
    let ([year, month, day], [hour, minute, second]) = (&date[..], &time[..]) else {
        return None;
    };
    let in_range = (1970..=9999).contains(year)
        && (1..=12).contains(month)
        && (1..=31).contains(day)
        && (0..24).contains(hour)
        && (0..60).contains(minute)
        && (0..61).contains(second);
    if !in_range {
        return None;
    }
    // Days from civil, with March as the first month of the year.
    let (y, m) = if *month > 2 { (*year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 719_469;
    Some(((days * 24 + hour) * 60 + minute) * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(date_seconds("1970-01-01"), Some(0));
        assert_eq!(date_seconds("2000-03-01T00:00:01"), Some(951_868_801));
        assert_eq!(date_seconds("2026-11-21T10:00:00"), Some(1_795_255_200));
        for bad in ["", "now", "2026-13-01", "2026-11", "1-1-1", "99999999999999999999-1-1"] {
            assert_eq!(date_seconds(bad), None, "{bad}");
        }
    }
}
