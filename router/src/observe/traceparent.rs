//! W3C trace context: which trace a request belongs to.

/// The trace of a request, and its own span in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TraceIds {
    pub(crate) trace: u128,
    /// Of the request itself.
    pub(crate) span: u64,
    /// The caller's span.
    pub(crate) parent: Option<u64>,
    /// Its spans are exported.
    pub(crate) sampled: bool,
}

impl TraceIds {
    /// As the caller's `traceparent` says, else a trace of its own. `ratio`: the part of those that is sampled; `None`: no
    /// spans are exported, so only the caller's trace is worth naming.
    pub(crate) fn of(traceparent: Option<&str>, ratio: Option<f64>) -> Option<Self> {
        let parent = traceparent.and_then(parse);
        if let Some((trace, span, sampled)) = parent {
            let sampled = sampled && ratio.is_some();
            return Some(Self { trace, span: new_span_id(), parent: Some(span), sampled });
        }
        let ratio = ratio?;
        let trace = uuid::Uuid::new_v4().as_u128();
        // The upper bits of this half of a UUID say its kind; the lower ones are random.
        let draw = (trace as u64 & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64;
        Some(Self { trace, span: new_span_id(), parent: None, sampled: draw < ratio })
    }

    /// 32 hex digits.
    pub(crate) fn trace_id(&self) -> String {
        format!("{:032x}", self.trace)
    }

    /// The header that names the request's own span.
    pub(crate) fn header(&self) -> String {
        format!("00-{:032x}-{:016x}-{:02x}", self.trace, self.span, u8::from(self.sampled))
    }
}

/// A span id is any number but zero.
pub(super) fn new_span_id() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0.max(1)
}

/// Trace, span and whether it is sampled. Later versions may have more fields behind these.
fn parse(header: &str) -> Option<(u128, u64, bool)> {
    let mut fields = header.trim().split('-');
    let mut hex = |digits: usize| {
        let is_hex = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        fields.next().filter(|field| field.len() == digits && field.bytes().all(is_hex))
    };
    let (version, trace, span, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    if version == "ff" || (version == "00" && fields.next().is_some()) {
        return None;
    }
    let trace = u128::from_str_radix(trace, 16).ok().filter(|trace| *trace != 0)?;
    let span = u64::from_str_radix(span, 16).ok().filter(|span| *span != 0)?;
    Some((trace, span, u8::from_str_radix(flags, 16).ok()? & 1 == 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_caller_s_trace_is_gone_on_with() {
        let ids = TraceIds::of(Some(HEADER), Some(0.0)).unwrap();
        assert_eq!(ids.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!((ids.parent, ids.sampled), (Some(0x00f0_67aa_0ba9_02b7), true));
        assert!(ids.header().starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-"));
        assert!(!TraceIds::of(Some(&HEADER.replace("-01", "-00")), Some(1.0)).unwrap().sampled);
        assert!(!TraceIds::of(Some(HEADER), None).unwrap().sampled, "nothing is exported");
        let later = HEADER.replace("00-4b", "cc-4b") + "-more";
        assert_eq!(TraceIds::of(Some(&later), None).unwrap().trace, ids.trace);
    }

    #[test]
    fn what_is_no_trace_parent_begins_a_trace_of_its_own() {
        let zero_trace = HEADER.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32));
        let bad = ["", "00", &HEADER[1..], &HEADER.to_uppercase(), &format!("{HEADER}-x"), &zero_trace, "ff-é"];
        for header in bad.iter().chain(&[HEADER.replace("00-4b", "ff-4b").as_str()]) {
            assert_eq!(TraceIds::of(Some(header), None), None, "{header}");
            assert_eq!(TraceIds::of(Some(header), Some(1.0)).unwrap().parent, None, "{header}");
        }
        assert_eq!(TraceIds::of(None, None), None);
    }

    #[test]
    fn the_ratio_is_the_part_that_is_sampled() {
        let sampled = |ratio| (0..2000).filter(|_| TraceIds::of(None, Some(ratio)).unwrap().sampled).count();
        assert_eq!((sampled(0.0), sampled(1.0)), (0, 2000));
        assert!((350..650).contains(&sampled(0.25)));
    }
}
