//! `loramux doctor --full`: every check of every op, the built-in model against the CPU, adapters changing places.

use loramux_kernels::device::check::Effort;

use super::args::{DoctorArgs, Part};
use super::machine::Machine;
use super::report::{Report, Section, Status};
use super::{basic, churn, model};

/// Looks at everything that takes minutes.
pub(crate) fn report(machine: &Machine, args: &DoctorArgs) -> Report {
    let wanted = |part| args.only.is_empty() || args.only.contains(&part);
    let mut sections = vec![basic::device(machine)];
    match &machine.device {
        Some(device) => {
            if wanted(Part::Ops) {
                sections.push(basic::ops(device, Effort::Full));
            }
            if wanted(Part::Model) {
                sections.push(model::section(machine, device, args));
            }
            if wanted(Part::Churn) {
                sections.push(churn::section(machine, device, args));
            }
        }
        None => {
            let mut section = Section::new("device checks");
            section.push(Status::Failed, "not run", "--full compares a device with the CPU, and there is none");
            sections.push(section);
        }
    }
    let mut report = Report {
        kind: "doctor --full",
        device: machine.choice.to_string(),
        is_emulated: machine.is_emulated(),
        setup: serde_json::Map::new(),
        sections,
        verdict: String::new(),
    };
    report.verdict = match (report.failures(), machine.is_emulated()) {
        (0, true) => {
            "Everything agrees with the CPU on the host emulator; nothing here says how fast a GPU is.".to_owned()
        }
        (0, false) => "Everything agrees with the CPU: this device may serve.".to_owned(),
        (failures, _) => {
            format!("{failures} failed: this device must not serve. Please report this page (--json has all of it).")
        }
    };
    report
}
